"""The network as transformers loads it. `tasks.convert` copies this file and the core files that it
imports into a folder for the hub, with relative imports.

AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)   # logits, a loss of labels
AutoModel.from_pretrained(FOLDER, trust_remote_code=True)              # hidden states
"""

import contextlib

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from configs import Config
from diffusion import time_at
from model import DiT, rotary_tables


class NanoMDLMConfig(PretrainedConfig):
    """nanomdlm["config"] has the fields of configs.Config."""

    model_type = "nanomdlm"

    def __init__(self, nanomdlm=None, **kwargs):
        self.nanomdlm = nanomdlm or {}
        super().__init__(**kwargs)


class NanoMDLMPreTrainedModel(PreTrainedModel):
    """Holds the DiT and runs its trunk; the two classes below differ in what they return."""

    config_class = NanoMDLMConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = DiT(Config(**config.nanomdlm["config"]))
        self.post_init()

    def _init_weights(self, module):
        """No file has the rotary tables, and from_pretrained leaves their memory uninitialised."""
        if isinstance(module, DiT):
            cos, sin = rotary_tables(len(module.cos), module.cos.shape[1])
            module.cos.copy_(cos)
            module.sin.copy_(sin)

    def get_input_embeddings(self):
        return self.model.embed

    def find_tokens(self, input_ids, attention_mask):
        """attention_mask as bool (B, L); it may exclude tokens at both ends of a row only."""
        if attention_mask is None:
            real = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            real = attention_mask.bool()
        if real.shape != input_ids.shape:
            shape = list(input_ids.shape)
            raise ValueError(f"attention_mask: {list(real.shape)}, must be as input_ids {shape}")
        begun, to_come = real.cumsum(1) > 0, real.flip(1).cumsum(1).flip(1) > 0
        if (begun & to_come & ~real).any():
            raise ValueError("attention_mask: excludes tokens between a row's first and last one")
        longest, length = int(real.sum(1).max()), self.model.cfg.seq_len
        if longest > length:
            raise ValueError(
                f"input_ids: {longest} tokens in a row, at most {length} fit; "
                "pass truncation=True to the tokenizer"
            )
        return real

    def run_trunk(self, input_ids, real, timesteps):
        """Hidden states (B, L, d), zero at padding. The network has no attention mask: rows with
        equally many tokens pass it together, without their padding, so a row's result does not
        depend on the others. A batch of n different lengths takes n calls."""
        cfg = self.model.cfg
        if timesteps is None:  # the time at which this fraction of the row is masked
            masked = ((input_ids == cfg.mask_id) & real).sum(1) / real.sum(1).clamp(min=1)
            timesteps = time_at(cfg, masked.double())
        t = timesteps.float()
        if real.all():
            return self.model.hidden(input_ids, t)
        lengths = real.sum(1)
        h = torch.zeros(*input_ids.shape, cfg.n_embd, device=input_ids.device)
        for n in set(lengths.tolist()) - {0}:
            rows = lengths == n
            tokens = real & rows[:, None]
            part = self.model.hidden(input_ids[tokens].view(-1, n), t[rows])
            h[tokens] = part.flatten(0, 1).to(h.dtype)
        return h

    def autocast(self):
        """Weights in half precision need it: the input of the time embedding is float32."""
        if self.dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(self.device.type, self.dtype)
        return contextlib.nullcontext()


class NanoMDLMModel(NanoMDLMPreTrainedModel):
    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        timesteps=None,
        return_dict=None,
    ):
        """As below, but returns the hidden states (B, L, d) in front of the head."""
        real = self.find_tokens(input_ids, attention_mask)
        with self.autocast():
            output = BaseModelOutput(self.run_trunk(input_ids, real, timesteps))
        return output.to_tuple() if return_dict is False else output


class NanoMDLMForMaskedLM(NanoMDLMPreTrainedModel):
    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        timesteps=None,
        labels=None,
        return_dict=None,
    ):
        """Logits (B, L, V) of the tokens; a causal network predicts position i from those before i.

        input_ids       (B, L); config.mask_token_id is MASK
        attention_mask  (B, L), 0 at padding at a row's ends; there the logits mean nothing
        token_type_ids  ignored: the network has no segments
        timesteps       (B,) in [0, 1]: 0 clean, 1 all masked; default: from the fraction of MASK
        labels          (B, L): adds `loss`, the mean cross-entropy in nats over the positions whose
                        label is not -100 and that are not padding. It is not the bound of the
                        training loss, which weights positions by time.
        """
        real = self.find_tokens(input_ids, attention_mask)
        with self.autocast():
            logits = self.model.logits(self.run_trunk(input_ids, real, timesteps))
        loss = None
        if labels is not None:
            labels = labels.masked_fill(~real, -100)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        output = MaskedLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output
