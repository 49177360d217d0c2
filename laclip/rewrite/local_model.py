"""The engine `transformers`: a causal language model from a local folder or a .gguf file."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import jinja2
import torch

from laclip import _native
from laclip.rewrite.engine import Answer, Request, Sampling, first_line
from laclip.rewrite.model_folder import load_model

_STREAM = 0x73616D706C652121  # keeps these random numbers apart from those of the prompts
_SORTED = 16  # batches whose prompts are sorted by length, so that little is padding


class LocalModel:
    """Completes prompts in batches; on a GPU where there is one.

    Sampling is by counter-based random numbers: the token at a step is a function of the model's
    probabilities, the request's seed and the step. So an answer depends neither on the batch nor on
    the order (but for rounding, which padding changes).
    """

    def __init__(self, path: str | Path, sampling: Sampling, *, batch_size: int = 16):
        self.tokenizer, self.model = load_model(path, "AutoModelForCausalLM", "--model")
        import transformers

        self.sampling, self.batch_size = sampling, batch_size
        self.device = self.model.device
        self.tokenizer.padding_side = "left"
        ends = self.model.generation_config.eos_token_id
        self.ends = torch.tensor(
            [*([ends] if isinstance(ends, int) else ends or []), self.tokenizer.eos_token_id],
            device=self.device,
        )
        stops = self.ends if sampling.chat else torch.cat([self.ends, self._line_ends()])
        self._stopping = transformers.StoppingCriteriaList([_StopAt(stops)])

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Answer]]:
        """Every request with its answer, batch by batch."""
        while chunk := list(islice(requests, _SORTED * self.batch_size)):
            prompts = [(request, self._ids(request)) for request in chunk]
            prompts.sort(key=lambda item: len(item[1]))
            for begin in range(0, len(prompts), self.batch_size):
                batch = prompts[begin : begin + self.batch_size]
                found = self._complete(
                    [ids for _, ids in batch], [request.seed for request, _ in batch]
                )
                yield from zip((request for request, _ in batch), found, strict=True)

    def _ids(self, request: Request) -> list[int]:
        prompt = self.sampling.prompt(request)
        if not self.sampling.chat:
            return self.tokenizer(prompt)["input_ids"]
        if not self.tokenizer.chat_template:
            raise ValueError("--chat: this model has no chat template; leave --chat out")
        try:
            text = self.tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:  # some know no system's turn
            raise ValueError(
                f"--chat: this model's chat template refuses the prompt ({error}); leave --chat out"
            ) from None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def _complete(self, prompts: list[list[int]], seeds: list[int]) -> list[Answer]:
        padded = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.device)
        width = padded["input_ids"].shape[1]
        output = self.model.generate(
            **padded,
            max_new_tokens=self.sampling.max_tokens,
            do_sample=False,  # _Sample leaves one token to choose from
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=[_Sample(seeds, width, self.sampling)],
            stopping_criteria=self._stopping,
        )[:, width:]
        return [self._answer(row) for row in output]

    def _answer(self, row: torch.Tensor) -> Answer:
        ends = torch.isin(row, self.ends).nonzero()
        ids = row[: int(ends[0])] if len(ends) else row
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        line = text if self.sampling.chat else first_line(text)
        whole = len(ends) > 0 or line != text
        return Answer(line, tokens=len(ids), cut=not whole)

    def _line_ends(self) -> torch.Tensor:
        """The tokens that end a line."""
        every = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        ids = [i for i, text in enumerate(every) if "\n" in text]
        return torch.tensor(ids, dtype=torch.long, device=self.device)


class _Sample:
    """A logits processor that leaves each row the one token that its seed draws (top-p)."""

    def __init__(self, seeds: list[int], width: int, sampling: Sampling):
        self.seeds, self.width = seeds, width
        self.temperature, self.top_p = sampling.temperature, sampling.top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return scores
        step = input_ids.shape[1] - self.width
        words = [_native.philox([seed, step, _STREAM, 0], 0, 0)[0] for seed in self.seeds]
        drawn = torch.tensor([(word >> 11) * 2.0**-53 for word in words], dtype=torch.float64)
        probabilities = torch.softmax(scores.float() / self.temperature, dim=-1)
        ordered, tokens = probabilities.sort(dim=-1, descending=True)
        reached = ordered.double().cumsum(dim=-1)
        # The fewest most likely tokens that reach top_p together.
        kept = (reached - ordered < self.top_p).sum(dim=-1, keepdim=True)
        total = reached.gather(1, kept - 1)
        place = torch.searchsorted(reached, drawn.to(scores.device)[:, None] * total, right=True)
        chosen = tokens.gather(1, torch.minimum(place, kept - 1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _StopAt:
    """A stopping criterion: rows whose last token is one of these are finished."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)
