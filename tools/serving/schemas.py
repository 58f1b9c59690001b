"""Bodies of requests, as OpenAI's interface defines them, with further sampling parameters by vLLM's names.

A field that is not known is refused: a parameter that has no effect would change answers unnoticed. Fields that say
nothing about the answer are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from moe_train.inference.text import is_unicode

_LONGEST_STOP = 256
_MOST_STOPS = 16
MOST_LOGPROBS = 20
_INT64 = 2**63

_StopText = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False


class SamplingBody(BaseModel):
    """What both kinds of requests share."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    model: str | None = Field(None, max_length=1000)
    temperature: _Finite | None = Field(None, ge=0, le=100)
    top_p: _Finite | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128)
    stop: _StopText | list[_StopText] | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    presence_penalty: _Finite | None = Field(None, ge=-2, le=2)
    frequency_penalty: _Finite | None = Field(None, ge=-2, le=2)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Names of vLLM.
    top_k: int | None = Field(None, ge=-1, lt=_INT64)
    min_p: _Finite | None = Field(None, ge=0, le=1)
    repetition_penalty: _Finite | None = Field(None, gt=0, le=100)
    ignore_eos: bool | None = None
    # Without an effect on the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    # Only their neutral values.
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @field_validator("*", mode="before")
    @classmethod
    def _check_texts(cls, value: Any) -> Any:
        """Refuse texts at any depth that no tokenizer can read."""
        if not is_unicode(value):
            raise PydanticCustomError("unicode", "not valid Unicode text")
        return value

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])[:_MOST_STOPS]


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0, lt=_INT64)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=128)
    suffix: Literal[""] | None = None


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": self.text, **named}


class ResponseFormat(BaseModel):
    """Form of the answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_tokens: int | None = Field(None, ge=1, lt=_INT64)
    max_completion_tokens: int | None = Field(None, ge=1, lt=_INT64)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0)
