"""The configuration of a Quiet-STaR model as a model of transformers.

This module imports no torch: `selftaught.auto_classes` registers the configuration with
transformers' `AutoConfig` as soon as that is imported. The model class is registered when the first
configuration is made.
"""

from importlib import import_module
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from selftaught.samplers.weights import QUIET_MODEL_TYPE as MODEL_TYPE

HOW_TO_OPEN = (
    "This model thinks before every token (Quiet-STaR). Run `pip install selftaught`, and "
    "`import selftaught` before transformers opens this folder. `selftaught quiet export-base` "
    "writes the base model alone."
)
"""Written into config.json, for those who open the folder without selftaught."""


class QuietForCausalLMConfig(PreTrainedConfig):
    """Configuration of `QuietForCausalLM`.

    Args:
        base_config: configuration of the base model, or its fields with `model_type`.
        quiet_config: fields of `QuietConfig`. None means the defaults.
        thought_start_id: id of the token that starts a thought.
        thought_end_id: id of the token that ends a thought.
        thought_pad_id: id of the padding token, which thoughts cannot contain. None means that there is none.
        options: fields of every configuration of transformers.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}

    def __init__(
        self,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        quiet_config: dict[str, Any] | None = None,
        thought_start_id: int = 0,
        thought_end_id: int = 1,
        thought_pad_id: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(base_config, dict):
            base_config = CONFIG_MAPPING[base_config["model_type"]](**base_config)
        self.base_config = None
        self.quiet_config = quiet_config or {}
        self.thought_start_id, self.thought_end_id = thought_start_id, thought_end_id
        self.thought_pad_id = thought_pad_id
        options.pop("how_to_open", None)
        self.how_to_open = HOW_TO_OPEN
        if base_config is not None:
            options["tie_word_embeddings"] = base_config.get_text_config().tie_word_embeddings
            # By name, because that module imports this one. It registers the model class.
            import_module("selftaught.quiet.transformers_model")
        chosen = {
            name: options.get(name) for name in ("attn_implementation", "experts_implementation")
        }
        super().__init__(**options)
        # Afterwards, because the constructor resets both implementations of a nested configuration,
        # and this one may be that of a model in use.
        self.base_config = base_config
        for name, value in chosen.items():
            if value is not None:
                setattr(self, f"_{name}", value)

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """Return the text configuration of the base model."""
        if self.base_config is None:
            return super().get_text_config(decoder=decoder, encoder=encoder)
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)


AutoConfig.register(MODEL_TYPE, QuietForCausalLMConfig, exist_ok=True)
