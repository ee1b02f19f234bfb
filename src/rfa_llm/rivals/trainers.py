"""One trainer a rival method; each `compute_loss` reads like its paper's formula (`rfa_llm.rivals.losses`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rfa_llm import reference, residuals
from rfa_llm.adapters import adapter_off
from rfa_llm.blocks import check_adapter_placement, find_blocks, num_blocks, resolve_blocks
from rfa_llm.checkpoints import digest
from rfa_llm.data.pairing import PairCollator, pad_rows
from rfa_llm.rivals import losses
from rfa_llm.rivals.config import RivalConfig
from rfa_llm.rivals.idk import IdkInsteadPairs, IdkPairs, read_idk_answers
from rfa_llm.unlearning_trainer import UnlearningTrainer


class Counts(NamedTuple):
    """What the losses of a global step are divided by, over all processes and accumulation; int64 scalars."""

    forget_tokens: torch.Tensor
    retain_tokens: torch.Tensor
    rows: torch.Tensor


@dataclass
class Answers:
    """Where a model predicts the tokens that count in one set's rows of a batch.

    Args:
        logits: `[n, vocab]`, all rows together.
        labels: `[n]`, the tokens.
        rows: `[n]`, the row of each, from 0.
        num_rows: How many rows there are.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    num_rows: int

    def row_log_probs(self) -> torch.Tensor:
        return losses.row_log_probs(self.logits, self.labels, self.rows, self.num_rows)

    def lengths(self) -> torch.Tensor:
        """Tokens of each row that count, `[num_rows]`."""
        return torch.bincount(self.rows, minlength=self.num_rows)


class RivalCollator(PairCollator):
    """`PairCollator` that marks each set's rows, `is_forget`, `is_retain` and, where pairs have it, `is_idk`."""

    def __call__(self, pairs: list[dict[str, dict]]) -> dict[str, torch.Tensor]:
        which = {"forget": self.forget_tokens, "retain": self.retain_tokens, "idk": self.forget_tokens}
        sets = list(pairs[0])
        rows = [pair[name] for name in sets for pair in pairs]
        of_set = torch.arange(len(rows)) // len(pairs)
        return {
            **pad_rows(rows, [which[name] for name in sets for _ in pairs], self.pad_token_id),
            **{f"is_{name}": of_set == number for number, name in enumerate(sets)},
        }


class RivalTrainer(UnlearningTrainer):
    """Base of the rivals' trainers: forget and retain rows in one forward, and the adapter-off model as reference.

    Choose one by its name, `RIVALS[args.method]`:

    ```python
    from rfa_llm.rivals import RIVALS, RivalConfig

    args = RivalConfig(method="npo", output_dir="adapter")
    trainer = RIVALS[args.method](
        model="path/to/fine-tuned-model",
        args=args,
        forget_dataset="forget.jsonl",
        retain_dataset="retain.jsonl",
    )
    trainer.train()
    trainer.save_model()
    ```

    Args:
        model, forget_dataset, retain_dataset, processing_class, quantization_config, callbacks, optimizers: As in
            [`UnlearningTrainer`].
        args ([`RivalConfig`], *optional*): Settings; their `method` is the trainer's own.
        peft_config ([`~peft.PeftConfig`], *optional*): The adapter; by default LoRA of rank 32. Without
            `target_modules` it goes on every linear layer of the blocks: all of them, or up to the last one that the
            method steers.

    Raises:
        ValueError, TypeError, FloatingPointError: As in [`UnlearningTrainer`].
    """

    method: str

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RivalConfig | None = None,
        forget_dataset: str | Dataset | None = None,
        retain_dataset: str | Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        if args is None:
            args = RivalConfig(output_dir=f"{self.method}-adapter", method=self.method)
        if args.method != self.method:
            raise ValueError(
                f"method: {args.method!r} is not what {type(self).__name__} trains; use RIVALS[{args.method!r}], or "
                f"set method={self.method!r}."
            )
        super().__init__(
            model=model,
            args=args,
            forget_dataset=forget_dataset,
            retain_dataset=retain_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            quantization_config=quantization_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def _make_collator(self, args, pad_token_id):
        return RivalCollator(pad_token_id, args.forget_tokens, args.retain_tokens)

    def _counted(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Positions whose next token counts, bool `[rows, tokens]`; nothing follows a row's last one."""
        has_next = inputs["attention_mask"].roll(-1, dims=1).bool()
        has_next[:, -1] = False
        return inputs["token_mask"] & has_next

    def _count_tokens(self, batches):
        counts = []
        for batch in batches:
            counted = self._counted(batch)
            forget, retain = counted[batch["is_forget"]].sum(), counted[batch["is_retain"]].sum()
            counts.append(torch.stack([forget, retain, batch["is_forget"].sum()]))
        return torch.stack(counts).sum(0)

    def _counts(self, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | None) -> Counts:
        return Counts(*(self._count_tokens([inputs]) if num_items_in_batch is None else num_items_in_batch))

    def _answers(self, model: nn.Module, inputs: dict[str, torch.Tensor], *sets: str) -> list[Answers]:
        """Run the model over the whole batch, and give the answers of each set named, `"forget"` and so on."""
        counted = self._counted(inputs)
        # Batches are padded on the right, so only what follows the first position that counts is projected.
        first = counted.any(0).int().argmax().item()
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            # A number would make a slice, for which the CPU's bfloat16 product copies the head's weights once a row.
            logits_to_keep=torch.arange(first, counted.shape[1]),
        ).logits
        labels = inputs["input_ids"].roll(-1, dims=1)
        answers = []
        for name in sets:
            of_set = inputs[f"is_{name}"]
            mask = counted[of_set]
            answers.append(
                Answers(logits[of_set][mask[:, first:]], labels[of_set][mask], mask.nonzero()[:, 0], len(mask))
            )
        return answers

    def _reference_answers(self, inputs: dict[str, torch.Tensor], *sets: str) -> list[Answers]:
        """The answers of the adapter-off model, which runs over the named sets' rows alone, without a graph."""
        of_sets = torch.stack([inputs[f"is_{name}"] for name in sets]).any(0)
        with adapter_off(self._peft_model()):
            return self._answers(self._peft_model(), {name: value[of_sets] for name, value in inputs.items()}, *sets)

    def _weighted(self, loss_forget, loss_retain, return_outputs, forget_factor=1.0, retain_factor=1.0):
        """`forget_weight · L_forget + retain_weight · L_retain`, each times its factor; checks and logs both losses.

        Times the number of processes, over which gradients are averaged.
        """
        self._stop_if_not_finite(loss_forget, loss_retain)
        self._add_up("loss_forget", loss_forget)
        self._add_up("loss_retain", loss_retain)
        loss = self.args.forget_weight * forget_factor * loss_forget
        if self.args.retain_weight:
            loss = loss + self.args.retain_weight * retain_factor * loss_retain
        loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


class GradAscentTrainer(RivalTrainer):
    """`L = −NLL(forget)`; the retain rows' NLL is logged and weighs nothing (`losses.nll`)."""

    method = "grad_ascent"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num = self._counts(inputs, num_items_in_batch)
        forget, retain = self._answers(model, inputs, "forget", "retain")
        loss_forget = -losses.nll(forget.logits, forget.labels, num.forget_tokens)
        loss_retain = losses.nll(retain.logits, retain.labels, num.retain_tokens)
        return self._weighted(loss_forget, loss_retain, return_outputs)


class GradDiffTrainer(GradAscentTrainer):
    """`L = −NLL(forget) + NLL(retain)` (arXiv 2203.12817): gradient ascent with a retain weight."""

    method = "grad_diff"


class KLTrainer(RivalTrainer):
    """`L = −NLL(forget) + KL(π₀ ‖ π)(retain)` (arXiv 2401.06121, KL minimization; `losses.kl`)."""

    method = "kl"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num = self._counts(inputs, num_items_in_batch)
        (retain0,) = self._reference_answers(inputs, "retain")
        forget, retain = self._answers(model, inputs, "forget", "retain")
        loss_forget = -losses.nll(forget.logits, forget.labels, num.forget_tokens)
        loss_retain = losses.kl(retain0.logits, retain.logits, num.retain_tokens)
        return self._weighted(loss_forget, loss_retain, return_outputs)


class NPOTrainer(RivalTrainer):
    """`L = NPO(forget) + NLL(retain)` (arXiv 2404.05868, NPO+RT; `losses.npo`)."""

    method = "npo"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num = self._counts(inputs, num_items_in_batch)
        (forget0,) = self._reference_answers(inputs, "forget")
        forget, retain = self._answers(model, inputs, "forget", "retain")
        loss_forget = losses.npo(forget.row_log_probs(), forget0.row_log_probs(), self.args.npo_beta, num.rows)
        loss_retain = losses.nll(retain.logits, retain.labels, num.retain_tokens)
        return self._weighted(loss_forget, loss_retain, return_outputs)


class SimNPOTrainer(RivalTrainer):
    """`L = SimNPO(forget) + NLL(retain)` (arXiv 2410.07163; `losses.simnpo`)."""

    method = "simnpo"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num, args = self._counts(inputs, num_items_in_batch), self.args
        forget, retain = self._answers(model, inputs, "forget", "retain")
        loss_forget = losses.simnpo(
            forget.row_log_probs(), forget.lengths(), args.simnpo_beta, args.simnpo_gamma, num.rows
        )
        loss_retain = losses.nll(retain.logits, retain.labels, num.retain_tokens)
        return self._weighted(loss_forget, loss_retain, return_outputs)


class _IdkTrainer(RivalTrainer):
    """Base of the two methods that answer forget questions with "I don't know"."""

    pairs: type[IdkPairs]

    def _before_data(self, args, config):
        self._idk_answers = read_idk_answers(args.idk_answers)

    def _make_pairs(self, args, forget, retain, forget_rows, processing_class):
        return self.pairs(forget, retain, args.seed, forget_rows, self._idk_answers, processing_class, args.max_length)

    def _method_fingerprint(self):
        return {"idk_answers": digest(json.dumps(self._idk_answers))}


class IdkNLLTrainer(_IdkTrainer):
    """`L = NLL("I don't know" to forget questions) + NLL(retain)` (arXiv 2401.06121; `losses.nll`)."""

    method = "idk_nll"
    pairs = IdkInsteadPairs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num = self._counts(inputs, num_items_in_batch)
        idk, retain = self._answers(model, inputs, "forget", "retain")
        loss_forget = losses.nll(idk.logits, idk.labels, num.forget_tokens)
        loss_retain = losses.nll(retain.logits, retain.labels, num.retain_tokens)
        return self._weighted(loss_forget, loss_retain, return_outputs)


class IdkDPOTrainer(_IdkTrainer):
    """`L = DPO("I don't know" over the forget answer) + NLL(retain)` (arXiv 2305.18290; `losses.dpo`)."""

    method = "idk_dpo"
    pairs = IdkPairs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num = self._counts(inputs, num_items_in_batch)
        idk0, forget0 = (answers.row_log_probs() for answers in self._reference_answers(inputs, "idk", "forget"))
        idk, forget, retain = self._answers(model, inputs, "idk", "forget", "retain")
        loss_forget = losses.dpo(
            idk.row_log_probs(), idk0, forget.row_log_probs(), forget0, self.args.dpo_beta, num.rows
        )
        loss_retain = losses.nll(retain.logits, retain.labels, num.retain_tokens)
        return self._weighted(loss_forget, loss_retain, return_outputs)


class UNDIALTrainer(RivalTrainer):
    """`L = UNDIAL(forget)`, and NLL(retain) where it is given a weight (arXiv 2402.10052; `losses.undial`)."""

    method = "undial"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num = self._counts(inputs, num_items_in_batch)
        (forget0,) = self._reference_answers(inputs, "forget")
        forget, retain = self._answers(model, inputs, "forget", "retain")
        loss_forget = losses.undial(
            forget.logits, forget0.logits, forget.labels, self.args.undial_strength, num.forget_tokens
        )
        loss_retain = losses.nll(retain.logits, retain.labels, num.retain_tokens)
        return self._weighted(loss_forget, loss_retain, return_outputs)


class ASUTrainer(RivalTrainer):
    """`L = KL(π_τ ‖ π)(forget) + KL(π₀ ‖ π)(retain)`, π_τ the reference under smoothed attention.

    Attention smoothing unlearning with the KL retain loss, ASU_KL of arXiv 2603.01285 (`losses.kl`); the attention of
    every layer and head is smoothed by the temperature τ (`rfa_llm.reference.smoothed_attention`).
    """

    method = "asu"

    def _check_model(self, args, base):
        obstacle = reference.attention_obstacle(base)
        if obstacle is not None:
            raise ValueError(f"method: 'asu' {obstacle}; use another method.")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num = self._counts(inputs, num_items_in_batch)
        (retain0,) = self._reference_answers(inputs, "retain")
        with reference.smoothed_attention_on(self._peft_model().get_base_model(), self.args.asu_temperature):
            (teacher,) = self._reference_answers(inputs, "forget")
        forget, retain = self._answers(model, inputs, "forget", "retain")
        loss_forget = losses.kl(teacher.logits, forget.logits, num.forget_tokens)
        loss_retain = losses.kl(retain0.logits, retain.logits, num.retain_tokens)
        return self._weighted(loss_forget, loss_retain, return_outputs)


class _FeatureTrainer(RivalTrainer):
    """Base of the two methods that steer the output of decoder blocks."""

    def _before_data(self, args, config):
        self.aligned = self._steered_blocks(args, num_blocks(config))

    def _steered_blocks(self, args: RivalConfig, count: int) -> list[int]:
        raise NotImplementedError

    def _last_adapted_block(self, config):
        return self.aligned[-1]

    def _check_model(self, args, base):
        check_adapter_placement(base, self.aligned)

    def _method_fingerprint(self):
        return {"blocks": ", ".join(map(str, self.aligned))}

    def _counted(self, inputs):
        """Features are taken at every position that counts, whether anything follows it or not."""
        return inputs["token_mask"]

    def _features(self, model: nn.Module, inputs: dict[str, torch.Tensor], blocks: list[int]) -> tuple[list, list]:
        """The blocks' features of the forget and of the retain rows, `[n, hidden]` a block, all on one device."""
        found = find_blocks(self._peft_model().get_base_model())
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        features = residuals.block_features(model, [found[index] for index in blocks], **tokens)
        on_forget, on_retain = (inputs["token_mask"] & inputs[f"is_{name}"][:, None] for name in ("forget", "retain"))
        forget, retain = residuals.select(features, on_forget), residuals.select(features, on_retain)
        device = self.args.device
        return [feature.to(device) for feature in forget], [feature.to(device) for feature in retain]

    def _reference_features(self, inputs: dict[str, torch.Tensor], blocks: list[int]) -> tuple[list, list]:
        """Those of the adapter-off model, without a graph."""
        with adapter_off(self._peft_model()):
            return self._features(self._peft_model(), inputs, blocks)


class RMUTrainer(_FeatureTrainer):
    """`L = ‖h(forget) − c·u‖² + ‖h(retain) − h⁰(retain)‖²` at one block (arXiv 2403.03218; `losses.rmu`)."""

    method = "rmu"

    def _before_data(self, args, config):
        super()._before_data(args, config)
        self._direction = losses.rmu_direction(config.get_text_config(decoder=True).hidden_size, args.seed)

    def _steered_blocks(self, args, count):
        blocks = resolve_blocks([min(7, count - 1)] if args.blocks is None else args.blocks, count)
        if len(blocks) > 1:
            raise ValueError(f"blocks: rmu steers one block, but got {args.blocks}; name one.")
        return blocks

    def _method_state(self):
        return self._direction[None]

    def _load_method_state(self, vectors):
        self._direction = vectors[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num = self._counts(inputs, num_items_in_batch)
        _, (h0_retain,) = self._reference_features(inputs, self.aligned)
        (h_forget,), (h_retain,) = self._features(model, inputs, self.aligned)
        target = self.args.rmu_steering_coeff * self._direction.to(h_forget.device)
        loss_forget = losses.rmu(h_forget, target, num.forget_tokens)
        loss_retain = losses.rmu(h_retain, h0_retain, num.retain_tokens)
        return self._weighted(loss_forget, loss_retain, return_outputs)


class CircuitBreakerTrainer(_FeatureTrainer):
    """`L = c_s·mean ReLU(cos(h, h⁰))(forget) + c_r·mean ‖h − h⁰‖(retain)`, c_s falling and c_r rising.

    Representation rerouting (arXiv 2406.04313; `losses.reroute`, `losses.keep`). Forget rows are rerouted at the
    chosen blocks, retain rows kept at every block up to the last of them, as in the authors' code, which counts the
    prompts' positions too (`RivalConfig`).
    """

    method = "circuit_breaker"

    def _steered_blocks(self, args, count):
        default = sorted({10 * count // 32, 20 * count // 32})
        return resolve_blocks(default if args.blocks is None else args.blocks, count)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num = self._counts(inputs, num_items_in_batch)
        up_to_last = list(range(self.aligned[-1] + 1))
        h0_forget, h0_retain = self._reference_features(inputs, up_to_last)
        h_forget, h_retain = self._features(model, inputs, up_to_last)
        steered, steered0 = ([features[block] for block in self.aligned] for features in (h_forget, h0_forget))
        loss_forget = losses.reroute(steered, steered0, num.forget_tokens)
        loss_retain = losses.keep(h_retain, h0_retain, num.retain_tokens)
        c_s, c_r = losses.circuit_breaker_schedule(
            self.state.global_step + 1, self.state.max_steps, self.args.circuit_breaker_alpha
        )
        return self._weighted(loss_forget, loss_retain, return_outputs, c_s, c_r)


RIVALS: dict[str, type[RivalTrainer]] = {
    trainer.method: trainer
    for trainer in (
        GradAscentTrainer,
        GradDiffTrainer,
        KLTrainer,
        NPOTrainer,
        SimNPOTrainer,
        IdkNLLTrainer,
        IdkDPOTrainer,
        RMUTrainer,
        UNDIALTrainer,
        CircuitBreakerTrainer,
        ASUTrainer,
    )
}
