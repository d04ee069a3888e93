"""Our models under the names and call signatures of `transformers`: extra `hf`, an optional door, used by nothing here.

    model = HopeForCausalLM.from_run("runs/.../weights");  model(input_ids, labels=labels).loss

Unusual: labels are the tokens themselves (shifted inside, as there), -100 is not scored, and `generate` is our own decoding
loop, so there is no beam search. `HsmnForConditionalGeneration` reads `input_ids` as the context and writes after it.
Rows may be padded on either side: the wrapper moves their tokens to the front for the model, and what it gives back stands in
the places that were asked about. Importing this file also registers both classes with `AutoConfig` and `AutoModelFor...`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, Seq2SeqLMOutput

from hsmn_dist.config.models import HopeConfig, ModelConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.build import construct_model
from hsmn_dist.models.contract import LanguageModel, ModelInput
from hsmn_dist.models.generation import GenerationSettings, generate_tokens
from hsmn_dist.models.pretrained import from_pretrained, load_config

IGNORED_LABEL = -100


class HsmnDistConfig(PretrainedConfig):
    """Holds our configuration section as a plain dictionary, `architecture`."""

    model_type = "hsmn_dist"

    def __init__(self, architecture: dict[str, Any] | None = None, **settings: Any) -> None:
        self.architecture = architecture or {}
        super().__init__(**settings)


def _mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    return torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


def _places(mask: Tensor) -> Tensor:
    """[B, T] places of each row's tokens, first to last, then those of its padding: what moves tokens to the front."""
    return (~mask).to(torch.int8).argsort(dim=1, stable=True)


class _Wrapper(PreTrainedModel):
    config_class = HsmnDistConfig
    families: tuple[str, ...] = ()

    def __init__(self, config: HsmnDistConfig) -> None:
        super().__init__(config)
        architecture = TypeAdapter(ModelConfig).validate_python(config.architecture)
        if architecture.family not in self.families:
            raise ModelError(
                f"a model of family {architecture.family!r} for {type(self).__name__}",
                allowed=f"family {' or '.join(self.families)}",
                action="use HopeForCausalLM for hope, HsmnForConditionalGeneration for hsmn and hsmn_hope",
            )
        self.inner: LanguageModel = construct_model(architecture)
        # A head that is the token table is one tensor in a file, and one parameter again when it comes back.
        ties = isinstance(architecture, HopeConfig) and architecture.ties_embeddings
        self._tied_weights_keys = {"inner.head.weight": "inner.embedding.weight"} if ties else {}
        config.tie_word_embeddings = ties
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: weights are drawn by `LanguageModel.init_weights`, or loaded."""

    @classmethod
    def from_run(cls, folder: str | Path) -> Any:
        """The model that a run exported, or that `save_pretrained` of ours wrote."""
        config = HsmnDistConfig(architecture=load_config(Path(folder)).model_dump(mode="json"))
        wrapper = cls(config)
        wrapper.inner = from_pretrained(folder)
        return wrapper.eval()

    @torch.no_grad()
    def _continue(self, input_ids: Tensor, attention_mask: Tensor | None, settings: dict[str, Any]) -> Tensor:
        """New tokens [B, at most max_new_tokens]: <eos> where a row ended, padding behind it."""
        eos_id, pad_id = settings.pop("eos_token_id", 2), settings.pop("pad_token_id", 0)
        mask = _mask(input_ids, attention_mask)
        places = _places(mask)
        chosen = GenerationSettings(**settings)
        rows = generate_tokens(self.inner, input_ids.gather(1, places), mask.gather(1, places), chosen, eos_id=eos_id)
        ended = [row + [eos_id] * (len(row) < chosen.max_new_tokens) for row in rows]
        width = max(len(row) for row in ended)
        padded = [row + [pad_id] * (width - len(row)) for row in ended]
        return torch.tensor(padded, dtype=torch.int64, device=input_ids.device).view(len(rows), width)


class HopeForCausalLM(_Wrapper):
    """HOPE as a causal language model: logits[:, t] predict token t + 1."""

    families = ("hope",)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Tokens [B, T], padded on either side -> logits [B, T, V], and the mean loss when `labels` [B, T] are given."""
        places = _places(_mask(input_ids, attention_mask))
        input_ids = input_ids.gather(1, places)
        labels = None if labels is None else labels.gather(1, places)
        attention_mask = None if attention_mask is None else attention_mask.gather(1, places)
        nothing = input_ids[:, :0]
        following = torch.cat([input_ids, torch.zeros_like(input_ids[:, :1])], dim=1)
        wanted = torch.full_like(following, IGNORED_LABEL)
        if labels is not None:
            wanted[:, 1:-1] = labels[:, 1:]
            if attention_mask is not None:
                wanted[:, :-1][attention_mask == 0] = IGNORED_LABEL
        inputs = ModelInput(nothing, nothing.bool(), following, torch.ones_like(following, dtype=torch.bool))
        logits = self.inner(inputs).logits
        assert logits is not None
        mask = wanted != IGNORED_LABEL
        loss = None if labels is None else functional.cross_entropy(logits[mask].float(), wanted[mask])
        back = places.argsort(dim=1)[..., None].expand(-1, -1, logits.shape[-1])
        return CausalLMOutput(loss=loss, logits=logits[:, 1:].gather(1, back))

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Tensor:
        """The prompts [B, T] as given and, behind them, the new tokens; settings of `GenerationSettings`."""
        return torch.cat([input_ids, self._continue(input_ids, attention_mask, settings)], dim=1)


class HsmnForConditionalGeneration(_Wrapper):
    """HSMN and its hybrid as an encoder-decoder: `input_ids` is the context, `labels` the target."""

    families = ("hsmn", "hsmn_hope")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> Seq2SeqLMOutput:
        """Context [B, n], padded on either side, and labels [B, T] (-100: not scored) -> mean loss and logits [B, T, V]."""
        if labels is None:
            raise ModelError(
                "a forward pass without labels",
                allowed="labels [B, T], the target tokens",
                action="pass labels, or call generate()",
            )
        scored = labels != IGNORED_LABEL
        mask = _mask(input_ids, attention_mask)
        places = _places(mask)
        inputs = ModelInput(input_ids.gather(1, places), mask.gather(1, places), labels.clamp(min=0), scored)
        logits = self.inner(inputs).logits
        assert logits is not None
        loss = functional.cross_entropy(logits[scored].float(), labels[scored])
        return Seq2SeqLMOutput(loss=loss, logits=logits)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Tensor:
        """Target tokens [B, at most max_new_tokens]; settings of `GenerationSettings`."""
        return self._continue(input_ids, attention_mask, settings)


AutoConfig.register(HsmnDistConfig.model_type, HsmnDistConfig, exist_ok=True)
AutoModelForCausalLM.register(HsmnDistConfig, HopeForCausalLM, exist_ok=True)
AutoModelForSeq2SeqLM.register(HsmnDistConfig, HsmnForConditionalGeneration, exist_ok=True)
