"""`moe-chat`: a conversation, typed or piped."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.roots import ChatRoot
from moe_train.inference import chat_template, protocol
from parallel.errors import ConfigError
from tests import forked
from tools import chat, trained_model

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
FACTS = protocol.Ready(64, 16, 0, 100, "one rank")


def model_of(trained: Path, **sampling: Any) -> tuple[ChatRoot, trained_model.TrainedModel]:
    cfg = compose([f"source={trained / 'run'}", "sampling.temperature=0", "runtime=cpu"], ChatRoot)
    for name, value in sampling.items():
        setattr(cfg.sampling, name, value)
    return cfg, trained_model.find(cfg, ["runtime"], "moe-chat")


class Echo:
    """Ranks that answer with how many tokens they got, one digit at a time."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.cancelled: list[int] = []

    def submit(self, prompt: list[int], params: dict[str, Any], stop: list[str], deliver: Any) -> int:
        self.prompts.append(prompt)
        for digit in f"{len(prompt)}/{params['max_new_tokens']}":
            deliver(protocol.Update(0, 0, digit, [protocol.ScoredToken(1, 0.0)]))
        deliver(protocol.Finished(0))
        return 0

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)


def conversation(trained: Path, ranks: Any, template: str | None) -> chat.Conversation:
    cfg, model = model_of(trained, max_new_tokens=40)
    cfg.chat.system = "S"
    return chat.Conversation(
        cfg, model, chat_template.ChatTemplate(template, model.tokenizer, "t"), ranks, FACTS
    )  # fmt: skip


def test_the_prompt_is_the_whole_conversation(trained: Path) -> None:
    ranks = Echo()
    talk = conversation(trained, ranks, TEMPLATE)
    shown: list[str] = []
    talk.answer("one", shown.append)
    talk.answer("two", shown.append)
    decode = talk.model.tokenizer.decode
    first = "[system]S[user]one"
    assert [decode(prompt) for prompt in ranks.prompts] == [
        first,
        f"{first}[assistant]{len(ranks.prompts[0])}/40[user]two",
    ]
    assert "".join(shown) == "".join(f"{len(prompt)}/40" for prompt in ranks.prompts)
    assert f"context {talk.tokens:,} of 100 | cache {-(-talk.tokens // 16)} of 64 blocks" in talk.status()
    talk.reset()
    talk.answer("three", shown.append)
    assert decode(ranks.prompts[-1]) == "[system]S[user]three"


def test_the_oldest_messages_make_room_and_a_message_that_is_too_long_is_refused(trained: Path) -> None:
    ranks = Echo()
    talk = conversation(trained, ranks, TEMPLATE)
    for _ in range(4):
        talk.answer("x y z " * 4, lambda text: None)
    assert max(map(len, ranks.prompts)) <= 100 - 16
    assert [m["role"] for m in talk.messages[:2]] == ["system", "user"]
    before = list(talk.messages)
    with pytest.raises(ConfigError, match=r"the message has \d+ tokens, and the model reads 100; shorten it"):
        talk.answer("x y z " * 60, lambda text: None)
    assert talk.messages == before


def test_a_message_that_the_ranks_refuse_is_not_kept(trained: Path) -> None:
    class Refusing(Echo):
        def submit(self, prompt: list[int], params: dict[str, Any], stop: list[str], deliver: Any) -> int:
            deliver(protocol.Rejected(0, "too long", "shorten it"))
            return 0

    talk = conversation(trained, Refusing(), TEMPLATE)
    before = list(talk.messages)
    with pytest.raises(ConfigError, match="too long; shorten it"):
        talk.answer("one", lambda text: None)
    with pytest.raises(ConfigError, match="refuses these messages"):
        talk.answer("\ud800", lambda text: None)
    assert talk.messages == before


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is(trained: Path) -> None:
    cfg, model = model_of(trained, max_new_tokens=4000)
    with model.ranks(cfg.engine) as ranks:
        facts = ranks.wait()
        talk = chat.Conversation(cfg, model, chat_template.load(model.tokenizer), ranks, facts)
        shown: list[str] = []

        def show(text: str) -> None:
            shown.append(text)
            if len(shown) == 3:
                os.kill(os.getpid(), signal.SIGINT)

        talk.answer("some text", show)
        assert 3 <= len(shown) < 4000
        assert talk.messages[-1] == {"role": "assistant", "content": "".join(shown)}
        cfg.sampling.max_new_tokens = 5
        talk.answer(" more", lambda text: None)  # goes on after the part that was kept
        assert ranks.load.used_blocks == 0
        assert talk.messages[-1]["role"] == "assistant"


def test_piped_lines_are_messages(trained: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(trained / "run" / "hf" / "step_00000002", tmp_path / "hf")
    (directory / "manifest.json").unlink(missing_ok=True)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    program = str(Path(sys.executable).parent / "moe-chat")
    words = [program, str(directory), "sampling.max_new_tokens=6", "sampling.temperature=0", "runtime=cpu"]
    with tempfile.TemporaryFile("w+") as stdin:
        stdin.write("one\n/reset\none\n\ntwo\n/exit\nthree\n")
        stdin.seek(0)
        done = forked.run(words, stdin=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    half = len(done.stdout) // 3
    first = next(done.stdout[:n] for n in range(half, 0, -1) if done.stdout.startswith(2 * done.stdout[:n]))
    assert first.endswith("\n")  # the same answer after /reset, and then another one
    assert done.stdout.removeprefix(2 * first).strip() not in ("", first.strip())


def test_what_the_terminal_is_shown_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from tools import terminal

    assert terminal.printable("a\x1b[2Jb\r\n\tcü") == "a\\x1b[2Jb\\r\n\tcü"
