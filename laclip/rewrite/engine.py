"""What every engine takes and gives, and which there are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laclip.rewrite.prompts import PromptSet


@dataclass
class Request:
    """One caption on its way through an engine."""

    shard: Any  # whose caption it is; engines pass it on
    number: int  # of the caption in its shard
    key: str
    caption: str
    examples: list[tuple[str, str]]
    seed: int  # 31 bits: sampling is a function of it
    tries: int = 0


@dataclass(frozen=True)
class Answer:
    """What an engine made of a request."""

    text: str
    tokens: int = 0  # made for it, where the engine counts them
    cut: bool = False  # it ran into the limit of new tokens
    refused: bool = False  # the server answers, but not to this caption: `text` says why
    failed: bool = False  # nothing after all tries: `text` says why
    similarity: float | None = None  # in meaning to the caption, where an encoder measures it


@dataclass(frozen=True)
class Sampling:
    """How a language model is asked; the defaults are the paper's."""

    prompts: PromptSet
    chat: bool = False
    temperature: float = 0.9
    top_p: float = 0.95
    max_tokens: int = 77

    def prompt(self, request: Request) -> Any:
        """The text, or for a chat the list of messages."""
        ask = self.prompts.messages if self.chat else self.prompts.text
        return ask(request.caption, request.examples)


def first_line(text: str) -> str:
    """The paper's answer: the completion up to the next line end."""
    return text.split("\n", 1)[0]


@dataclass(frozen=True)
class EngineSettings:
    """Which engine, and what it needs; a worker on another machine builds it from this."""

    engine: str  # openai | transformers | eda | backtranslate
    sampling: Sampling
    model: str = ""
    servers: tuple[str, ...] = ()
    in_flight: int = 64
    batch_size: int = 16
    wordnet: Path = Path()
    through: str = "spa"
    translators: tuple[str, ...] = ()  # folders: there and back
    encoder: str = ""  # a folder; where there is one, answers carry their similarity


def build_engine(settings: EngineSettings) -> Any:
    """An engine: answers(requests) gives (request, answer) pairs, in any order."""
    engine = _build_engine(settings)
    if not settings.encoder:
        return engine
    from laclip.rewrite.meaning import Encoder, Measured

    return Measured(engine, Encoder(settings.encoder))


def _build_engine(settings: EngineSettings) -> Any:
    if settings.engine == "eda":
        from laclip.rewrite.wordnet import EasyAugmentation

        return EasyAugmentation(settings.wordnet)
    if settings.engine == "backtranslate":
        from laclip.rewrite.translation import BackTranslation, ModelTranslation

        if settings.translators:
            return ModelTranslation(settings.translators, settings.batch_size)
        return BackTranslation(settings.through)
    if settings.engine == "transformers":
        from laclip.rewrite.local_model import LocalModel

        return LocalModel(settings.model, settings.sampling, batch_size=settings.batch_size)
    from laclip.rewrite.servers import Servers

    servers = list(settings.servers)
    return Servers(servers, settings.model, settings.sampling, in_flight=settings.in_flight)
