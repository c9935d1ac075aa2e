"""GrootL for lm-evaluation-harness: importing this module registers the model ``grootl``.

Unlike the harness's own ``hf`` model, it passes on the length of each prompt, over which GrootL builds its trees::

    lm_eval.simple_evaluate(model="grootl", model_args={"pretrained": FOLDER}, tasks=["piqa"])
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from grootvl_mm.language import GrootLConfig, GrootLForCausalLM
from grootvl_mm.language.loading import load_config

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel
except ImportError as error:
    raise ImportError(
        f"grootvl_mm.language.evaluation needs lm-eval ({error}); install it with: pip install lm-eval"
    ) from error

RESERVED = ("dtype", "quantization_config")  # arguments of the harness that are also fields of the configuration
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context ids, continuation ids


class _Input(NamedTuple):
    """The model's input for a request."""

    ids: tuple[int, ...]
    prompt_length: int


@register_model("grootl")
class GrootLLM(HFLM):
    """A GrootL model, or a Mamba model with GrootL's trees.

    The context of a request is its prompt, over which the trees are built. Scores do not depend on the other requests
    in a batch. Rolling log-likelihoods have no prompt, so that no token sees a later one; in generation, the whole
    context is the prompt.

    Accepts the arguments of the harness's ``hf`` model and the fields of
    :class:`~grootvl_mm.language.GrootLConfig`. An adapter (``peft``) uses the trees that it was trained with.
    """

    AUTO_MODEL_CLASS = GrootLForCausalLM  # for Mamba checkpoints, too

    def __init__(self, pretrained: str | PreTrainedModel, backend: str = "causal", **settings: Any) -> None:
        super().__init__(pretrained, backend=backend, **settings)

    def _create_model(self, pretrained: str, peft: str | None = None, **kwargs: Any) -> None:
        """Load the model. Unlike in the harness, an adapter does not resize the embeddings."""
        fields = GrootLConfig().to_dict()
        settings = {name: kwargs.pop(name) for name in list(kwargs) if name in fields and name not in RESERVED}
        super()._create_model(pretrained, config=load_config(peft or pretrained, **settings), **kwargs)
        if peft:
            self._model = PeftModel.from_pretrained(self._model, peft)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations.

        Args:
            requests: Texts, context ids and continuation ids; texts are None for windows of a rolling log-likelihood.
            disable_tqdm: Hide the progress bar.
            override_bs: Batch size.

        Returns:
            For each request, the log-probability of its continuation, and whether greedy decoding would produce it.

        Raises:
            ValueError: A continuation is empty or longer than ``max_length``.
        """
        waiting: dict[Any, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            model_input = self._input(request)
            # Requests that differ only in the last token, such as single-token choices, share a forward pass.
            waiting[model_input if self.logits_cache else (*model_input, index)].append(index)
        order = sorted(waiting, key=lambda key: -len(key[0]))
        size = self._size_of_batches(requests, override_bs)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        progress = tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"
        )
        for start in range(0, len(order), size):
            keys = order[start : start + size]
            logits = self._logits([_Input(*key[:2]) for key in keys])
            for key, row in zip(keys, logits, strict=True):
                for index in waiting[key]:
                    text, _, continuation = requests[index]
                    answers[index] = self._score(row[: len(key[0])], continuation)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answers[index])
                    progress.update()
        progress.close()
        return answers

    def _input(self, request: Request) -> _Input:
        text, context, continuation = request
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"the continuation of {text} has {len(continuation)} tokens; expected 1 to max_length={self.max_length}"
            )
        ids = (context + continuation)[:-1]
        cut = max(0, len(ids) - self.max_length)
        return _Input(tuple(ids[cut:]), 0 if text is None else len(context) - cut)

    def _size_of_batches(self, requests: Sequence[Request], override: int | None) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        if override or not requests:
            return override or 1
        longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
        return self._detect_batch_size([longest])

    def _logits(self, inputs: Sequence[_Input]) -> Tensor:
        """Logits (B, L, V) of inputs of different lengths, padded on the right."""
        length = max(len(model_input.ids) for model_input in inputs)
        ids = torch.zeros(len(inputs), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, model_input in enumerate(inputs):
            ids[row, : len(model_input.ids)] = torch.tensor(model_input.ids)
            mask[row, : len(model_input.ids)] = 1
        return self._call(ids, mask, torch.tensor([model_input.prompt_length for model_input in inputs]))

    def _call(self, ids: Tensor, mask: Tensor, prompt_lengths: Tensor) -> Tensor:
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(
                ids.to(self.device), attention_mask=mask.to(self.device), prompt_lengths=prompt_lengths.to(self.device)
            ).logits

    def _score(self, logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """Log-probability of the continuation, given the logits of its input, and whether it is the greedy one."""
        log_probs = F.log_softmax(logits[-len(continuation) :], dim=-1, dtype=self.softmax_dtype)
        targets = torch.tensor(continuation, device=logits.device)
        total = log_probs.gather(-1, targets[:, None]).sum()
        return float(total), bool((log_probs.argmax(dim=-1) == targets).all())

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        """Find the batch size with inputs that are entirely prompts, which need the most memory."""
        with self._as_prompts():
            return super()._detect_batch_size(requests, pos)

    _inputs_are_prompts = False

    @contextmanager
    def _as_prompts(self) -> Iterator[None]:
        self._inputs_are_prompts = True
        try:
            yield
        finally:
            self._inputs_are_prompts = False

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if not self._inputs_are_prompts:
            return super()._model_call(inps, attn_mask, labels)
        return self._call(inps, torch.ones_like(inps), torch.full(inps.shape[:1], inps.shape[1]))
