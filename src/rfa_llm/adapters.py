"""A saved adapter, read with care: peft itself takes what fits a model, leaves the rest out, and says nothing."""

from __future__ import annotations

from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel


def read_adapter(adapter: str) -> PeftConfig:
    """The configuration of a saved adapter, whose weights can be read too.

    Raises:
        ValueError: It is no adapter, its weights are broken, or it is of a kind without a place in a base's weights.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
        load_peft_weights(adapter, device="cpu")
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"adapter_name_or_path: {adapter!r} is no adapter ({error}); pass the folder that `rfa-llm unlearn` "
            "wrote, or a Hub id."
        ) from error
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter_name_or_path: {adapter!r} is of the type {config.peft_type.value}, which has no place in the "
            "base's weights; pass a LoRA adapter."
        )
    return config


def on_its_base(model: PreTrainedModel, adapter: str) -> PeftModel:
    """The model with the adapter on; one whose weights are of other places or sizes is refused.

    Raises:
        ValueError: The adapter does not fit the model.
    """
    try:
        model = PeftModel.from_pretrained(model, adapter)
        loaded = set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"))
        missing = [name for name in loaded.missing_keys if model.base_model.prefix in name]
        wrong = f"{len(loaded.unexpected_keys)} weights too many, {len(missing)} too few"
        fits = not loaded.unexpected_keys and not missing
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        fits, wrong = False, str(error).splitlines()[-1].strip()
    if not fits:
        raise ValueError(
            f"model_name_or_path: the adapter {adapter!r} does not fit {model.name_or_path!r} ({wrong}); pass the "
            "model that it was trained on."
        )
    return model
