"""`UnlearningTrainer`: what the unlearning methods here share; each adds its loss."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from rfa_llm.adapters import adapter_off, computing_in_model_dtype
from rfa_llm.blocks import check_decoder_only, disable_dropout, num_blocks, placed, read_config
from rfa_llm.card import TAGS, Words, model_card
from rfa_llm.checkpoints import (
    METHOD_STATE_NAME,
    base_config_digest,
    base_model_digest,
    newest_whole_checkpoint,
    own_settings,
    read_method_state,
    run_fingerprint,
    write_method_state,
)
from rfa_llm.data.formats import check_disjoint, check_tokenizer, load_rows, prepare
from rfa_llm.data.pairing import ForgetRetainPairs, LengthGroupedPairs, PairCollator
from rfa_llm.hub import (
    CARD_NAME,
    base_on_hub,
    check_private,
    check_repository,
    check_said,
    check_words,
    hub_sentences,
    publish,
    text_settings,
)
from rfa_llm.memory import base_model_bytes, held_values, peak_bytes, reshard, start_peak
from rfa_llm.receipt import (
    SALT_NAME,
    adapter_digests,
    answer_figures,
    figure_rows,
    make_receipt,
    new_salt,
    public_name,
    read_adapter_config,
    read_salt,
    with_card,
    write_receipt,
)
from rfa_llm.unlearning_config import UnlearningConfig

LAST_GOOD_NAME = "last_good_adapter"
# The adapter where no `peft_config` is given: fields of `LoraConfig`.
DEFAULT_LORA = {"r": 32, "lora_alpha": 64}
# Of `model_init_kwargs`, those that say where a model's files are: its configuration and tokenizer lie there too.
SOURCE = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only")
# Settings that say nothing where the optimizer or the scheduler is given.
OPTIMIZER = ("optim", "learning_rate", "weight_decay")
SCHEDULER = ("lr_scheduler_type", "warmup_steps")
# What peft's `init_lora_weights` may be: the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights.
BASE_KEEPING_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


class UnlearningTrainer(Trainer):
    """Trainer of a LoRA adapter that makes a causal language model forget; a method adds `compute_loss`.

    The base weights never move, and the reference is the same model with its adapter off. A method may override
    `_before_data`, `_make_pairs`, `_before_model`, `_last_adapted_block`, `_check_model`, `_make_collator`,
    `_method_fingerprint`, `_count_tokens`, `_has_ended`, `_method_state` and `_load_method_state`; `__init__` calls
    the first seven. `method` is its name.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model that has to forget: an id
            or path, a causal LM, or one that carries a trainable adapter already, which is then trained. The base
            model's dropout is switched off in place.
        args ([`UnlearningConfig`]): Settings.
        forget_dataset (`str` or [`~datasets.Dataset`]): What to forget: rows, a .jsonl, .json, .csv or .parquet
            file, or a Hub id, in one of the formats of `rfa_llm.data.formats`.
        retain_dataset (`str` or [`~datasets.Dataset`]): What to keep, likewise.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The tokenizer; by default the
            model's own.
        peft_config ([`~peft.PeftConfig`], *optional*): The adapter; by default LoRA of rank 32. Without
            `target_modules` it goes on every linear layer of the blocks up to `_last_adapted_block`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): For an id or path.
        callbacks, optimizers: As in [`~transformers.Trainer`].

    Raises:
        ValueError, TypeError: Bad input; one sentence that names the argument, the value and the mend, before the
            model is loaded where that can be.
        FloatingPointError: From `train`, when a loss is not finite; the last good adapter is on disk by then.
    """

    method: str
    _tag_names = TAGS
    # `compute_loss` divides by the tokens of the whole global step, accumulation included.
    loss_is_scaled_for_ga = True
    # What helps where not even the first loss is finite.
    _never_finite_mend = "load the model in float32 or bfloat16"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: UnlearningConfig,
        forget_dataset: str | Dataset | None = None,
        retain_dataset: str | Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        if not isinstance(args, UnlearningConfig):
            raise TypeError(f"args: got a {type(args).__name__}; pass the trainer's own config, such as RFAConfig.")
        _check_output_dir(args)
        _check_launch(args)
        # The draw of LoRA's first weights must not depend on what ran before.
        set_seed(args.seed)

        # Everything that can be refused without the model's weights is, before they are loaded.
        if not isinstance(model, (str, PreTrainedModel, PeftModel)):
            raise TypeError(
                f"model: got a {type(model).__name__}; pass an id or path as text, a causal LM or a PeftModel."
            )
        check_peft_config(model.active_peft_config if isinstance(model, PeftModel) else peft_config)
        is_path = isinstance(model, str)
        if is_path:
            init_kwargs = {"dtype": "auto", **(args.model_init_kwargs or {})}
            source = {name: init_kwargs[name] for name in SOURCE if name in init_kwargs}
            config, name = read_config(model, "model", "a causal language model", **source), model
        else:
            if quantization_config is not None or args.model_init_kwargs is not None:
                raise ValueError(
                    "model: it is loaded already, so quantization_config and model_init_kwargs cannot apply; pass its "
                    "id or path, or leave them out."
                )
            source, config, name = {}, model.config, model.config.name_or_path
        check_decoder_only(config, name)
        self._before_data(args, config)

        if processing_class is None:
            if not name:
                raise ValueError("processing_class: a model without a name has no tokenizer to load; pass one.")
            processing_class = AutoTokenizer.from_pretrained(name, **source)
        check_tokenizer(processing_class)
        forget_rows, retain_rows = (
            load_rows(rows, field)
            for rows, field in ((forget_dataset, "forget_dataset"), (retain_dataset, "retain_dataset"))
        )
        forget = prepare(forget_rows, processing_class, "forget_dataset", args.max_length)
        retain = prepare(retain_rows, processing_class, "retain_dataset", args.max_length)
        check_disjoint(forget, retain, "forget_dataset", "retain_dataset")
        _check_ids(config, processing_class, forget, retain)
        self._rows = {"forget": forget_rows, "retain": retain_rows}
        self._sets = {"forget": forget, "retain": retain}
        if args.push_to_hub:
            # Before hours of training, not after.
            self._words(args, name)
        pairs = self._make_pairs(args, forget, retain, forget_rows, processing_class)
        step = args.per_device_train_batch_size * args.world_size
        if args.dataloader_drop_last and len(pairs) < step:
            raise ValueError(
                f"dataloader_drop_last: the {len(pairs)} forget rows are less than the {step} of a step, so all would "
                "be dropped; leave it out."
            )
        if args.train_sampling_strategy == "group_by_length":
            pairs.group_by_length()
        self._before_model(args, model, config, forget, retain, processing_class.pad_token_id)

        if is_path:
            model = AutoModelForCausalLM.from_pretrained(
                model, **init_kwargs, **({"quantization_config": quantization_config} if quantization_config else {})
            )
        makes_adapter = not isinstance(model, PeftModel)
        model = self._with_adapter(args, model, peft_config)
        # The Trainer puts the tokenizer's special tokens into it.
        self._base_config = base_config_digest(model.get_base_model().config)

        super().__init__(
            model=model,
            args=args,
            data_collator=self._make_collator(args, processing_class.pad_token_id),
            train_dataset=pairs,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Not before: the Trainer takes a model that is spread over several GPUs for one device.
        if args.n_gpu > 1:
            raise ValueError(
                "args: DataParallel (one process, several GPUs) would cut a batch between its forget and its retain "
                "rows; launch a process for each GPU (`--accelerate_config ddp`), show one (CUDA_VISIBLE_DEVICES=0), "
                "or spread the model over them (model_init_kwargs={'device_map': 'auto'})."
            )
        # peft saves no such tags of its own; the Hub lists adapters by them.
        self.model.add_model_tags(self._tag_names)
        self.add_callback(_NextEpochsPairs(self.train_dataset))

        self._base_bytes = base_model_bytes(self.model)
        self._fingerprint = self._make_fingerprint(forget, retain)
        self._sums: dict[str, torch.Tensor] = {}
        self._sums_since_step = 0
        self._good_step, self._good_adapter = -1, {}
        # One for all processes. A run that goes on in its folder keeps the folder's: with another no row of a receipt
        # that was published could be proved any more.
        salt_file = Path(args.output_dir) / SALT_NAME
        keeps = salt_file.is_file() and (args.resume_from_checkpoint or not args.overwrite_output_dir)
        self._salt = broadcast_object_list([read_salt(salt_file) if keeps else new_salt()])[0]
        self._figures_of, self._figures = None, {}
        optimizer, scheduler = optimizers
        given = [*(() if optimizer is None else OPTIMIZER), *(() if scheduler is None else SCHEDULER)]
        self._given = dict.fromkeys(given, "given")
        self._new_adapter = self._adapter_digest() if makes_adapter else None
        self._began_new: bool | None = None

    # ---- what a method may override ----

    def _before_data(self, args: UnlearningConfig, config: PreTrainedConfig) -> None:
        """Check the settings against the model's config, before anything else is read."""

    def _before_model(
        self,
        args: UnlearningConfig,
        model: str | PreTrainedModel | PeftModel,
        config: PreTrainedConfig,
        forget: Dataset,
        retain: Dataset,
        pad_token_id: int,
    ) -> None:
        """Do what has to be done with the encoded sets before the model takes its memory."""

    def _make_pairs(
        self,
        args: UnlearningConfig,
        forget: Dataset,
        retain: Dataset,
        forget_rows: Dataset,
        processing_class: PreTrainedTokenizerBase,
    ) -> ForgetRetainPairs:
        """The training set, from the encoded sets and the forget set's rows as they were given."""
        return ForgetRetainPairs(forget, retain, args.seed)

    def _make_collator(self, args: UnlearningConfig, pad_token_id: int) -> PairCollator:
        return PairCollator(pad_token_id, args.forget_tokens, args.retain_tokens)

    def _last_adapted_block(self, config: PreTrainedConfig) -> int:
        """The block up to which an adapter without `target_modules` goes."""
        return num_blocks(config) - 1

    def _check_model(self, args: UnlearningConfig, base: PreTrainedModel) -> None:
        """Check the base model, loaded and with its adapter on."""

    def _method_state(self) -> torch.Tensor:
        """What a checkpoint keeps of the method, `[vectors, hidden]` float32."""
        return torch.empty(0)

    def _load_method_state(self, vectors: torch.Tensor) -> None:
        """Take `_method_state` of a checkpoint."""

    def _method_fingerprint(self) -> dict[str, str]:
        """What a checkpoint must share with the run beyond the settings; replaces settings of the same name."""
        return {}

    # ---- the model ----

    def _with_adapter(
        self, args: UnlearningConfig, model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None
    ) -> PeftModel:
        """The model with its adapter on, checked, without dropout of the base model's own."""
        if isinstance(model, PeftModel):
            if peft_config is not None:
                raise ValueError("peft_config: the model carries an adapter already; leave peft_config out.")
            if list(model.peft_config) != ["default"]:
                raise ValueError(
                    f"model: its adapters are {list(model.peft_config)}; give it a single one, named 'default', which "
                    "peft saves in the folder itself."
                )
        else:
            if peft_config is None:
                peft_config = LoraConfig(task_type="CAUSAL_LM", **DEFAULT_LORA)
            peft_config = placed(peft_config, model, self._last_adapted_block(model.config))
            # peft's own place for it: the adapter names its base whole.
            model = get_peft_model(model, peft_config, revision=(args.model_init_kwargs or {}).get("revision"))
        base = model.get_base_model()
        if not any(parameter.requires_grad for parameter in base.parameters()):
            raise ValueError(
                "peft_config: the adapter has no trainable parameter; load it with `is_trainable=True`, or pass the "
                "model without one."
            )
        self._check_model(args, base)
        disable_dropout(base)
        return model

    def _peft_model(self) -> PeftModel:
        return self.accelerator.unwrap_model(self.model)

    def compute_loss_context_manager(self):
        stack = super().compute_loss_context_manager()
        recomputes = self.args.activation_checkpointing or (
            self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.activation_checkpointing
        )
        stack.enter_context(computing_in_model_dtype(self._peft_model(), self.args.device, recomputes))
        return stack

    # ---- counting, logging, guarding ----

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        args = self.args
        pairs = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGroupedPairs(self.train_dataset, pairs)

    def _count_tokens(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        counts = [torch.stack([batch["on_forget"].sum(), batch["on_retain"].sum()]) for batch in batches]
        return torch.stack(counts).sum(0)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Tokens that count in the global step, `[forget, retain]` int64, over all processes and accumulation."""
        return self.accelerator.reduce(self._count_tokens(batch_samples).to(device), "sum")

    def _add_up(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what `_add_up` took since the last log.

        They go into the Trainer's own logs, the loss and the summary at the end, and not into a callback's.
        """
        if "train_loss" in logs:
            # The summary at the end; in place, because `train` returns this dict as the run's metrics.
            logs.update(self._memory_figures())
        if self._sums and ("loss" in logs or "train_loss" in logs):
            steps = self.state.global_step - self._sums_since_step
            totals = self.accelerator.reduce(torch.stack(list(self._sums.values())), "sum") / steps
            logs = {**logs, **dict(zip(self._sums, totals.tolist(), strict=True))}
            self._sums, self._sums_since_step = {}, self.state.global_step
        super().log(logs, start_time)

    def _memory_figures(self) -> dict[str, int]:
        peaks = self.accelerator.gather(torch.tensor([peak_bytes(self.args.device)], device=self.args.device))
        per_process = {f"peak_bytes/process_{rank}": peak for rank, peak in enumerate(peaks.tolist())}
        return {"base_model_bytes": self._base_bytes, **per_process}

    def _stop_if_not_finite(self, loss_forget: torch.Tensor, loss_retain: torch.Tensor) -> None:
        """Keep a copy of the adapter as long as its losses are finite; stop, with that copy on disk, when not."""
        bad = ~torch.isfinite(torch.stack([loss_forget.detach(), loss_retain.detach()]))
        # Summed, so that every process stops when one has to.
        bad = self.accelerator.reduce(bad.int(), "sum")
        if not bad.any():
            if self._good_step != self.state.global_step:
                self._good_step = self.state.global_step
                self._good_adapter = {name: [v.clone() for v in held_values(p)] for name, p in self._adapter()}
            return
        sets = " and ".join(name for name, is_bad in zip(("forget", "retain"), bad.tolist(), strict=True) if is_bad)
        self._stop(f"The loss on the {sets} set is not finite at step {self.state.global_step + 1}")

    def _stop(self, what: str) -> None:
        """Put the last good adapter on disk and raise `FloatingPointError`."""
        if not self._good_adapter and self.state.global_step == 0:
            raise FloatingPointError(f"{what}, before the adapter has learned anything; {self._never_finite_mend}.")
        if not self._good_adapter:
            raise FloatingPointError(
                f"{what}, the first one since the checkpoint; go on from an older one, or begin anew with a lower "
                "learning_rate."
            )
        for name, parameter in self._adapter():
            for value, good in zip(held_values(parameter), self._good_adapter[name], strict=True):
                value.copy_(good)
        folder = Path(self.args.output_dir) / LAST_GOOD_NAME
        super().save_model(str(folder), _internal_call=True)
        raise FloatingPointError(
            f"{what}; the adapter as it was when the losses were last finite (after step {self._good_step}) is in "
            f"{folder}; lower learning_rate."
        )

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a plain PEFT adapter, which `PeftModel.from_pretrained` loads, with its model card and its receipt.

        The receipt's salt, `_forget_salt.txt`, lies beside them; keep it private. With `args.push_to_hub` the
        files of `rfa_llm.hub.files_to_publish` go up too.

        Args:
            output_dir: The folder; by default `args.output_dir`.

        Raises:
            FloatingPointError: The last step left the adapter not finite; the last good one is on disk.
            ValueError, PermissionError, ConnectionError: As `push_to_hub`; the adapter is on disk.
        """
        folder = self.args.output_dir if output_dir is None else output_dir
        values = [value for _, p in self._adapter() for value in held_values(p)]
        bad = sum((~torch.isfinite(value)).sum().to(self.args.device) for value in values)
        if self.accelerator.reduce(bad, "sum"):
            self._stop(f"The adapter is not finite after step {self.state.global_step}")
        super().save_model(folder, _internal_call=True)
        # Checkpoints are saved by an internal call.
        if not _internal_call:
            self._write_papers(folder)
            if self.args.push_to_hub:
                self._publish(folder, self._words(self.args, self._base_name()), "Model save")

    def _write_papers(self, folder: str) -> None:
        """Put the receipt and the card beside a saved adapter."""
        figures = self._answer_figures(folder)
        if not self.args.should_save:
            return
        receipt = make_receipt(
            self.args,
            self.method,
            {**self._method_fingerprint(), **self._given},
            self._peft_model().get_base_model(),
            self._fingerprint["base_model"],
            self._base_config,
            folder,
            {
                "mixed_precision": self.accelerator.mixed_precision,
                "steps": self.state.global_step,
                "new_adapter": self._is_new() if self._began_new is None else self._began_new,
            },
            self._rows,
            self._salt,
            figures,
        )
        base_model = self.args.hub_base_model or receipt["base_model"]["name"]
        words = Words(forgotten=self.args.forgotten, base_model=base_model)
        card = str(model_card(receipt, words, Path(folder).absolute().name, read_adapter_config(folder)))
        write_receipt(folder, with_card(receipt, card), self._salt)
        (Path(folder) / CARD_NAME).write_bytes(card.encode())

    def _answer_figures(self, folder: str) -> dict[str, dict[str, float]]:
        """What is said of the answers "before" and "after", once for each adapter that was saved in a folder; nothing
        where this run has not trained."""
        if self.state.global_step == 0:
            return {}
        weights = [adapter_digests(folder)["weights"] if self.args.should_save else None]
        weights = broadcast_object_list(weights)[0]
        if self._figures_of != weights:
            batch_size = 2 * self.args.per_device_train_batch_size
            sets = {name: figure_rows(self._rows[name], self._sets[name], self._salt) for name in self._sets}
            with adapter_off(self._peft_model()):
                before = answer_figures(self.model, sets, batch_size)
            self._figures = {"before": before, "after": answer_figures(self.model, sets, batch_size)}
            self._figures_of = weights
            reshard(self.model)
        return self._figures

    # ---- publishing ----

    def _base_name(self) -> str:
        return self._peft_model().get_base_model().config.name_or_path

    def _words(
        self,
        args: UnlearningConfig,
        base_name: str,
        forgotten: str | None = None,
        base_model: str | None = None,
        **more,
    ) -> Words:
        """What is said in the place of the settings, or they say, checked."""
        words = Words(forgotten or args.forgotten, base_on_hub(base_model or args.hub_base_model, base_name), **more)
        check_words(words)
        check_private({"what you say was forgotten": words.forgotten.encode()}, self._rows["forget"])
        # The Trainer makes the repository as soon as it is made itself.
        repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
        # As the receipt will have them.
        settings = text_settings({name: getattr(args, name) for name in own_settings(args)})
        said = {name: public_name(text) for name, text in settings.items()}
        said |= {"forgotten": words.forgotten, "hub_model_id": repo_id, "base_model": words.base_model}
        said["base_model's revision"] = (args.model_init_kwargs or {}).get("revision") or ""
        check_said(said, self._rows["forget"])
        return words

    def _publish(
        self,
        folder: str,
        words: Words,
        commit_message: str,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        return publish(
            folder,
            self.hub_model_id,
            words,
            forget_rows=self._rows["forget"],
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            blocking=blocking,
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in [`~transformers.Trainer.init_hf_repo`]; what the Hub refuses is said in one sentence.

        Raises:
            ValueError: The repository is there and cannot take the adapter (`rfa_llm.hub.check_repository`).
            PermissionError, ConnectionError: The Hub refuses the token, or does not answer.
        """
        args = self.args
        with hub_sentences(args.hub_model_id or Path(args.output_dir).absolute().name):
            super().init_hf_repo(token=token, private=private)
            if self.is_world_process_zero():
                private = args.hub_private_repo if private is None else private
                check_repository(HfApi(token=token or args.hub_token), self.hub_model_id, private, args.hub_revision)

    def create_model_card(self, *args, **kwargs) -> None:
        """Not the Trainer's: the card that `save_model` writes is covered by the receipt."""
        raise ValueError("create_model_card: `save_model` writes the card, with its receipt; leave this call out.")

    def predict(self, *args, **kwargs) -> None:
        """Not the Trainer's, whose loss is over pairs of rows."""
        raise ValueError("predict: there is nothing of it here; ask the model itself (`trainer.model.generate`).")

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        forgotten: str | None = None,
        base_model: str | None = None,
        datasets: Sequence[str] = (),
        license: str | None = None,
        evaluations: dict[str, dict[str, float]] | None = None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the adapter in `args.output_dir` and put it on the Hub as `args.hub_model_id`, with card and receipt.

        Only the adapter, its configuration, the tokenizer, the card and the receipt go up; nothing else of
        `output_dir` does.

        Args:
            commit_message, blocking, token, revision, private: As in [`~transformers.Trainer.push_to_hub`].
            forgotten: What was forgotten, in your own words; by default `args.forgotten`.
            base_model: Hub id of the base; by default `args.hub_base_model`, or the model's own where it is one.
            datasets, license, evaluations: For the card, as in `rfa_llm.card.Words`.

        Returns:
            The commit, or a `Future` of it where not `blocking`; `None` in processes other than the first.

        Raises:
            ValueError: Nothing is said of what was forgotten, or in words of the forget set, or the base is a folder.
            PermissionError: The Hub refuses the token.
            ConnectionError: The connection was lost; the repository is as it was.
        """
        more = {"datasets": datasets, "license": license, "evaluations": evaluations or {}}
        words = self._words(self.args, self._base_name(), forgotten, base_model, **more)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self._write_papers(self.args.output_dir)
        return self._publish(self.args.output_dir, words, commit_message, blocking, token, revision, private)

    def _adapter(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _adapter_digest(self) -> str:
        """SHA-256 over what this process holds of the adapter, which says whether it has changed."""
        whole = hashlib.sha256()
        for _, parameter in self._adapter():
            for value in held_values(parameter):
                whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return whole.hexdigest()

    def _is_new(self) -> bool:
        """Whether the adapter is as this trainer made it; one that was handed over is not."""
        return self._adapter_digest() == self._new_adapter

    def _make_fingerprint(self, forget: Dataset, retain: Dataset) -> dict[str, str]:
        # Only the first process is sure to have the base model's values (FSDP may leave the others without).
        digest = [base_model_digest(self.model, reads=self.accelerator.is_main_process)]
        return run_fingerprint(
            self.args,
            self._peft_model().active_peft_config,
            self._method_fingerprint(),
            broadcast_object_list(digest)[0],
            self._launch(),
            forget["input_ids"][:],
            retain["input_ids"][:],
        )

    def _launch(self) -> str:
        kind, processes = self.accelerator.distributed_type, self.accelerator.num_processes
        if kind == DistributedType.DEEPSPEED:
            return f"ZeRO-{self.accelerator.deepspeed_plugin.zero_stage} on {processes} processes"
        if kind == DistributedType.FSDP:
            return f"FSDP on {processes} processes"
        return "the whole model in each process"

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train the adapter.

        Args:
            resume_from_checkpoint: A checkpoint to go on from, or `True` for the newest whole one in `output_dir`
                (a kill in the middle of a write leaves one that is not).
            kwargs: As in [`~transformers.Trainer.train`].

        Returns:
            `TrainOutput`; its metrics hold also `base_model_bytes` (the base model's weights, all devices together)
            and `peak_bytes/process_N` (`rfa_llm.memory.peak_bytes` of each process).

        Raises:
            ValueError: There is no whole checkpoint, or it belongs to another forget set, retain set, base model or
                setting (which).
            FloatingPointError: A loss is not finite; the last good adapter is on disk by then.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint: True, but {self.args.output_dir!r} holds no whole checkpoint; leave it "
                    "out to start anew."
                )
        if resume_from_checkpoint:
            self._load_method_state(read_method_state(resume_from_checkpoint, self._fingerprint))
        self._began_new = self._is_new()
        start_peak(self.args.device)
        if not self.args.activation_checkpointing:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        base = self._peft_model().get_base_model()
        # transformers lets the embedding ask for gradients, or LoRA inside a checkpointed block would get none, and
        # forgets the hook of an earlier call.
        base.disable_input_require_grads()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            base.disable_input_require_grads()

    def _has_ended(self) -> bool:
        """Whether a resumed run had come to its end."""
        return self.state.global_step >= self.state.max_steps

    def _run_epoch(self, **kwargs):
        # The Trainer would take one step more.
        if self._has_ended():
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # What an earlier run left there is whole no more.
            (folder / METHOD_STATE_NAME).unlink(missing_ok=True)
        # Older checkpoints go only when the new one is whole: every process has written its part, and the mark is set.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_method_state(folder, self._method_state(), self._fingerprint)
            # By time, so that what a kill left half-written, whatever its step, goes first.
            rotate_checkpoints(self.args.output_dir, limit, use_mtime=True)

    def _init_training_state(self, *args, **kwargs):
        # A resumed run's first logged step must not be averaged over the steps before it.
        result = super()._init_training_state(*args, **kwargs)
        self._sums, self._sums_since_step = {}, self.state.global_step
        self._good_step, self._good_adapter = -1, {}
        return result


class _NextEpochsPairs(TrainerCallback):
    """Tells the pairs which epoch it is; accelerate does not reach the dataset when a sampler takes `set_epoch`."""

    def __init__(self, pairs: ForgetRetainPairs):
        self.pairs = pairs

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.pairs.set_epoch(int(state.epoch))


def _check_launch(args: UnlearningConfig) -> None:
    accelerator = args.accelerator_config
    if args.world_size > 1 and not (accelerator.even_batches or accelerator.split_batches):
        raise ValueError(
            "accelerator_config: even_batches=False may leave a process without a batch that the others wait for; "
            "leave it out."
        )
    if accelerator.dispatch_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches would cut a batch between its forget and its retain rows; leave it "
            "off."
        )
    # accelerate goes on alone, without a word, where it finds no device or backend for a process of several.
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != args.world_size:
        raise ValueError(
            f"args: {started} processes were started, but they are not connected and each would train alone; on the "
            "CPU set use_cpu=True (with DeepSpeed ddp_backend='gloo' instead)."
        )


def _check_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, forget: Dataset, retain: Dataset) -> None:
    """Check that the model knows each token: beyond its embeddings a GPU would say something else altogether."""
    known = config.get_text_config(decoder=True).vocab_size
    largest = max(tokenizer.pad_token_id, *(max(ids) for rows in (forget, retain) for ids in rows["input_ids"]))
    if largest >= known:
        raise ValueError(
            f"processing_class: its token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is beyond the "
            f"model's {known} embeddings; pass the model's own tokenizer, or resize the model's embeddings."
        )


def _check_output_dir(args: UnlearningConfig) -> None:
    if Path(args.output_dir).is_file():
        raise ValueError(f"output_dir: {args.output_dir!r} is a file; give the name of a folder.")
    # A finished run puts its adapter at the top; a run to resume has checkpoints below it only.
    done = (Path(args.output_dir) / CONFIG_NAME).exists()
    if done and not args.overwrite_output_dir and not args.resume_from_checkpoint:
        raise ValueError(
            f"output_dir: {args.output_dir!r} already holds an adapter; choose another folder or set "
            "overwrite_output_dir."
        )


def check_peft_config(peft_config: PeftConfig | None) -> None:
    """Check that an adapter can be trained here, from its config alone.

    Raises:
        ValueError: It has no rank, or would not leave the base as it is.
    """
    settings = {} if peft_config is None else peft_config.to_dict()
    if peft_config is not None and peft_config.is_prompt_learning:
        raise ValueError(f"peft_config: {type(peft_config).__name__} puts nothing into the blocks; use a LoraConfig.")
    if isinstance(peft_config, LoraConfig) and (not isinstance(peft_config.r, int) or peft_config.r < 1):
        raise ValueError(f"peft_config: r={peft_config.r!r} is no rank; give a whole number of 1 or more.")
    bias = settings.get("bias", "none")
    if bias != "none":
        raise ValueError(
            f"peft_config: bias={bias!r} trains the base's own biases, and the base without its adapter is what this "
            "method compares with; leave it 'none'."
        )
    init = settings.get("init_lora_weights", True)
    if init not in BASE_KEEPING_INITS:
        raise ValueError(
            f"peft_config: init_lora_weights={init!r} changes the base's weights, and the base without its adapter is "
            f"what this method compares with; use one of {', '.join(map(repr, BASE_KEEPING_INITS))}."
        )
