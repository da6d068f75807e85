"""Fields of a config.json: each is read with its type and range, known not to matter, or refused.

transformers takes a model class's own default where a field is missing, and says nothing of fields that
it does not know. Here a field that nobody read is refused by its name, because it may be the one that
makes it another model.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from moe_jax.errors import UserError
from moe_jax.models.stack import ComputeDtype

_Value = TypeVar("_Value")

REQUIRED: Any = object()
"""As a default: the field has to be there."""

# More is no model, and would take hours until its tensors are missed.
MOST_LAYERS = 10_000
MOST_EXPERTS = 100_000

# No model computes anything else because of these, for one of five reasons.
IRRELEVANT = frozenset(
    {
        # Who wrote the file, and where from.
        "_name_or_path", "name_or_path", "_commit_hash", "architectures", "auto_map",
        "model_type", "tokenizer_class", "transformers_version", "unsloth_fixed", "unsloth_version",
        "_attn_implementation_autoset", "_from_model_config",
        # What is returned, and by which program; every program computes the same.
        "_attn_implementation", "attn_implementation", "_experts_implementation",
        "experts_implementation", "chunk_size_feed_forward", "output_attentions",
        "output_hidden_states", "output_past", "output_router_logits", "return_dict", "torchscript",
        "use_cache", "use_bfloat16", "tf_legacy_loss", "pretraining_tp", "gradient_checkpointing",
        "_flash_attn_2_enabled",
        # Of models with one stack for two uses, which none of these has.
        "is_decoder",
        # Losses and initial values of training, which are no part of a loaded config.
        "router_aux_loss_coef", "problem_type",
        # Numbers of tokens, which the tokenizer reads.
        "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
        # How texts are generated unless one says otherwise.
        "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids",
        "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff",
        "eta_cutoff", "exponential_decay_length_penalty", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "target_lookbehind",
        "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
        "max_new_tokens", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix",
        "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
        "suppress_tokens", "task_specific_params", "temperature", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip

# Of models that have no classes, which may have labels all the same.
LABELS = frozenset({"finetuning_task", "id2label", "label2id", "num_labels"})


class Fields(Mapping[str, Any]):
    """A config.json that remembers what was read of it.

    Names that a family has for the same field may be given instead of the field's; a mapping's own
    access reads a field as it stands.
    """

    def __init__(self, hf: Mapping[str, Any], aliases: Mapping[str, str] | None = None) -> None:
        """Takes a config.json, which stays as it is.

        Args:
          hf: its content.
          aliases: further names of fields: {further name: field}.

        Raises:
          UserError: a field has two names and two values.
        """
        self._values = dict(hf)
        self._read: set[str] = set()
        for alias, name in (aliases or {}).items():
            if alias not in hf:
                continue
            value = self._values.pop(alias)
            if name in hf and hf[name] != value:
                raise UserError(
                    f"config.json has {name}={shortened(hf[name])} and {alias}={shortened(value)}, which "
                    f"are two names of the same field for {self.model_type}; leave one of them out."
                )
            self._values[name] = value

    @property
    def model_type(self) -> str:
        """The family's name."""
        return str(self._values.get("model_type"))

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        """Whether the field is there; that alone is no reading."""
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def raw(self, name: str, default: Any = None) -> Any:
        """The value as it stands.

        Raises:
          UserError: it is missing and required.
        """
        self._read.add(name)
        if name not in self._values and default is REQUIRED:
            raise UserError(f"config.json has no {name}, which a {self.model_type} needs; add it.")
        return self._values.get(name, default)

    def integer(
        self, name: str, default: Any = REQUIRED, at_least: int = 1, at_most: int = 2**31 - 1
    ) -> int:
        """A whole number.

        Raises:
          UserError: it is none, too small or too large.
        """
        value = self.raw(name, default)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not at_least <= value <= at_most:
            self._refuse(name, value, f"a whole number from {at_least} to {at_most}")
        return value

    def number(
        self,
        name: str,
        default: Any = REQUIRED,
        above: float = -math.inf,
        at_least: float = -math.inf,
    ) -> float:
        """A finite number, as a float.

        Raises:
          UserError: it is none, or too small.
        """
        return checked_number(self.raw(name, default), name, self.model_type, above, at_least)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """True or false.

        Raises:
          UserError: it is neither.
        """
        value = self.raw(name, default)
        if not isinstance(value, bool):
            self._refuse(name, value, "true or false")
        return value

    def choice(self, name: str, options: Mapping[str, _Value], default: Any = REQUIRED) -> _Value:
        """What a word means.

        Raises:
          UserError: it is not one of `options`.
        """
        value = self.raw(name, default)
        if not isinstance(value, str) or value not in options:
            raise UserError(
                f"config.json has {name}={shortened(value)}; supported are {', '.join(options)}."
            )
        return options[value]

    def only(self, name: str, *supported: Any) -> None:
        """Refuses all values but these; the field may be missing.

        Raises:
          UserError: it has another value.
        """
        value = self.raw(name, supported[0])
        # To Python 0 is False, and 1 is True.
        if not any(
            value == s and isinstance(value, bool) == isinstance(s, bool) for s in supported
        ):
            raise UserError(
                f"config.json has {name}={shortened(value)}; only {name}={supported[0]!r} is supported "
                f"for {self.model_type}."
            )

    def refuse_unread(self, irrelevant: Collection[str]) -> None:
        """Refuses fields that nobody read and that are not known not to matter.

        Args:
          irrelevant: of this family, beside those of all.

        Raises:
          UserError: there is one, and it says something.
        """
        for name in self:
            if name in self._read or name in IRRELEVANT or name in irrelevant:
                continue
            # Nothing is asked for: null, false, an empty text, list or object.
            value = self._values[name]
            if value is None or value is False or value in ("", [], {}):
                continue
            raise UserError(
                f"config.json has {name}={shortened(value)}, a field that is not known for "
                f"{self.model_type} and may make it another model; take it out of config.json if "
                "nothing computes with it."
            )

    def _refuse(self, name: str, value: Any, wanted: str) -> None:
        raise UserError(
            f"config.json has {name}={shortened(value)}, but a {self.model_type} needs {wanted}; "
            "correct it."
        )


def checked_number(
    value: Any,
    name: str,
    model_type: str,
    above: float = -math.inf,
    at_least: float = -math.inf,
) -> float:
    """A finite number as a float.

    Args:
      value: of the field.
      name: the field's, for the error.
      model_type: the family's, for the error.
      above, at_least: what it has to be.

    Raises:
      UserError: it is no number, not finite or too small.
    """
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    # Integers of a JSON file may be larger than any float.
    fits = numeric and abs(value) <= 1e300
    if fits and value > above and value >= at_least:
        return float(value)
    wanted = "a finite number"
    if above > -math.inf:
        wanted += f" above {above:g}"
    elif at_least > -math.inf:
        wanted += f" of at least {at_least:g}"
    raise UserError(
        f"config.json has {name}={shortened(value)}, but a {model_type} needs {wanted}; correct it."
    )


def check_no_pruning(fields: Fields) -> None:
    """Refuses what changes any family's layers one by one.

    Raises:
      UserError: heads are pruned, layers have configs of their own, or stacks share parameters.
    """
    fields.only("pruned_heads", None, {}, [])
    fields.only("per_layer_config", None, {}, [])
    fields.only("tie_encoder_decoder", False, None)


def check_decoder(fields: Fields) -> None:
    """Refuses a decoder that would read an encoder or see later tokens.

    Raises:
      UserError: it does.
    """
    check_no_pruning(fields)
    fields.only("is_encoder_decoder", False, None)
    fields.only("add_cross_attention", False, None)
    fields.only("cross_attention_hidden_size", None)


def check_encoder_decoder(fields: Fields) -> None:
    """Refuses what is not an encoder and a decoder that reads it.

    Raises:
      UserError: config.json says it is not.
    """
    check_no_pruning(fields)
    fields.only("is_encoder_decoder", True, None)


def compute_dtype(fields: Fields) -> ComputeDtype:
    """bfloat16 for models saved in it, otherwise float32.

    Raises:
      UserError: the name is no dtype that is supported.
    """
    name, old = fields.raw("dtype"), fields.raw("torch_dtype")
    name = old if name is None else name
    supported = (None, "auto", "float32", "float16", "bfloat16")
    if name not in supported:
        raise UserError(
            f"config.json has dtype={shortened(name)}; supported are float32, float16 and bfloat16."
        )
    return ComputeDtype.BFLOAT16 if name == "bfloat16" else ComputeDtype.FLOAT32


def shortened(value: Any, most: int = 80) -> str:
    """A value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def whole_numbers(fields: Fields, name: str) -> Sequence[int]:
    """A list of whole numbers; none where it is missing or null.

    Raises:
      UserError: it is something else.
    """
    value = fields.raw(name)
    if value is None:
        return []
    if not isinstance(value, list) or any(type(entry) is not int for entry in value):
        raise UserError(
            f"config.json has {name}={shortened(value)}, but a {fields.model_type} needs a list of "
            "whole numbers; correct it."
        )
    return value
