"""`moe-chat`: talk to a trained model in the terminal.

    moe-chat runs/NAME
    moe-chat hf-directory chat.system="Answer briefly." sampling.temperature=0.6
    printf 'Hello\\nAnd then?\\n' | moe-chat runs/NAME

The model is a run (its newest checkpoint), a Megatron checkpoint or a Hugging Face directory. Messages go through the
tokenizer's chat template. A base model has none: it continues the text so far. /reset begins another conversation,
/exit or Ctrl-D ends the program, Ctrl-C stops an answer. With piped input each line is a message.
"""

from __future__ import annotations

import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from launch.local.engine_ranks import EngineRanks, Event, Lost
from moe_train.config.roots import ChatRoot
from moe_train.inference import chat_template, protocol
from moe_train.inference.chat_template import ChatTemplate
from parallel.errors import ConfigError
from tools import terminal, trained_model
from tools.generate import params_of

_COMMON = (
    *trained_model.COMMON, "sampling.max_new_tokens", "sampling.temperature", "sampling.top_p", "chat.system",
    "chat.template",
)  # fmt: skip
_HELP = "/reset begins another conversation, /exit ends the program, Ctrl-C stops an answer"
_FEWEST_NEW_TOKENS = 16  # for which older messages are dropped


def main() -> NoReturn:
    """Console script."""
    trained_model.main(
        run,
        ChatRoot,
        about=__doc__,
        common=_COMMON,
        answers=True,
    )


def run(cfg: ChatRoot, words: Sequence[str]) -> None:
    """Talk until the user ends it.

    Args:
        words: overrides of the command line.

    Raises:
        MoeTrainError: with a cause and a remedy.
    """
    model = trained_model.find(cfg, words, "moe-chat")
    template = chat_template.load(model.tokenizer, cfg.chat.template)
    cfg.engine.max_sequences = 1
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with model.ranks(cfg.engine) as ranks:
        if on_terminal:
            print(f"loading {model.name} ...", end="", flush=True)
        facts = ranks.wait()
        conversation = Conversation(cfg, model, template, ranks, facts)
        if on_terminal:
            kind = "its chat template" if template.exists else "no chat template: it continues the text"
            print(f"\r{model.name}, {facts.layout}, {kind}. {_HELP}.")
            _talk(conversation, _typed(conversation.status))
        else:
            _talk(conversation, (text.rstrip("\n") for text in sys.stdin))


@dataclass
class Conversation:
    """The messages so far, and how the next answer is generated."""

    cfg: ChatRoot
    model: trained_model.TrainedModel
    template: ChatTemplate
    ranks: EngineRanks
    facts: protocol.Ready
    messages: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0
    """Of the last prompt and its answer."""
    rate: float = 0.0
    """Tokens per second of the last answer."""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again, with the system message."""
        system = self.cfg.chat.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.tokens, self.rate = 0, 0.0

    def status(self) -> str:
        """One line about the last answer and the cache."""
        longest, blocks = self.facts.max_sequence_length, self.facts.num_blocks
        used = -(-self.tokens // self.facts.block_size)
        return (
            f"{self.rate:,.1f} tokens/s | context {self.tokens:,} of {longest:,} | cache {used:,} of {blocks:,} blocks"
        )

    def answer(self, text: str, show: Callable[[str], None]) -> None:
        """Add a message and generate the answer to it. Ctrl-C stops the answer, and what there is of it is kept.

        Raises:
            ConfigError: the message is longer than what the model can read, or the template refuses it.
            MoeTrainError: a rank failed.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            prompt, new = self._prompt()
            values: dict[str, Any] = {"max_new_tokens": new}
            params, stop = params_of(self.cfg.sampling, self.model.stop_token_ids, values)
            events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
            with _sigint(lambda: events.put(None)):
                number = self.ranks.submit(prompt, dict(vars(params)), stop, events.put)
                answer = self._shown(number, len(prompt), events, show)
        except BaseException:  # a message without an answer is not part of the conversation
            self.messages = before
            raise
        self.messages.append({"role": "assistant", "content": answer})

    def _shown(
        self, number: int, prompt_tokens: int, events: queue.SimpleQueue[Event | None], show: Callable[[str], None]
    ) -> str:
        """The text of the answer, which `show` gets in pieces."""
        pieces: list[str] = []
        count, first, self.tokens = 0, 0.0, prompt_tokens
        while True:
            event = events.get()
            if event is None:
                self.ranks.cancel(number)
                break
            if isinstance(event, Lost):
                raise event.error
            if isinstance(event, protocol.Rejected):
                raise ConfigError(event.cause, event.remedy)
            if isinstance(event, protocol.Finished):
                break
            now = time.monotonic()
            count, first = count + len(event.tokens), first or now
            self.rate = (count - 1) / (now - first) if now > first else 0.0
            self.tokens = prompt_tokens + count
            pieces.append(event.text)
            show(event.text)
        return "".join(pieces)

    def _prompt(self) -> tuple[list[int], int]:
        """Tokens of the conversation, and how many can follow. The oldest messages are dropped where they do not fit.

        Raises:
            ConfigError: the last message alone does not fit.
        """
        longest, wanted = self.facts.max_sequence_length, self.cfg.sampling.max_new_tokens
        while True:
            tokens = self.template.encode(self.messages, self.model.encode)
            room = longest - len(tokens)
            if room >= min(wanted, _FEWEST_NEW_TOKENS):
                return tokens, min(wanted, room)
            first = 1 if self.messages[0]["role"] == "system" else 0
            if len(self.messages) - first < 3:
                raise ConfigError(f"the message has {len(tokens)} tokens, and the model reads {longest}", "shorten it")
            del self.messages[first : first + 2]  # a question with its answer


def _talk(conversation: Conversation, texts: Iterator[str]) -> None:
    """Answer each text, until one ends the conversation. An error in a message does not end it."""
    on_terminal = sys.stdout.isatty()

    def show(text: str) -> None:
        print(terminal.printable(text) if on_terminal else text, end="", flush=True)

    for text in texts:
        command = text.strip()
        if command == "/exit":
            return
        if command == "/reset":
            conversation.reset()
        elif command == "/help":
            print(_HELP)
        elif command.startswith("/") and " " not in command and on_terminal:
            print(f"{terminal.printable(command)} is not a command: {_HELP}")
        elif command:
            try:
                conversation.answer(text, show)
            except ConfigError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            print(flush=True)


def _typed(status: Callable[[], str]) -> Iterator[str]:
    """What the user types, with history and a status line."""
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession("> ", bottom_toolbar=status)
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            print(_HELP)
        except EOFError:
            return


@contextmanager
def _sigint(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at Ctrl-C inside the block."""

    def handler(number: int, frame: FrameType | None) -> None:
        stop()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
