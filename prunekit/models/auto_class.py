"""Which class of transformers opens a model, and what it is for."""

from dataclasses import dataclass

CAUSAL_LM = "AutoModelForCausalLM"


@dataclass(frozen=True)
class AutoClass:
    """A class of transformers that opens models of many types.

    Attributes:
        name: Its name.
        task: Task of such a model on the hub; None for a model without a head.
        peft: The same as peft calls it; None where peft has no such task.
    """

    name: str
    task: str | None = None
    peft: str | None = None


KNOWN = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": AutoClass(CAUSAL_LM, "text-generation", "CAUSAL_LM"),
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": AutoClass(
        "AutoModelForSeq2SeqLM", "translation", "SEQ_2_SEQ_LM"
    ),
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": AutoClass(
        "AutoModelForImageTextToText", "image-text-to-text"
    ),
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": AutoClass(
        "AutoModelForSequenceClassification", "text-classification", "SEQ_CLS"
    ),
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": AutoClass("AutoModelForMaskedLM", "fill-mask"),
}
"""Classes by the table of transformers that lists their models; the first that fits counts."""


def auto_class(model_type: str, architecture: str) -> AutoClass:
    """Return the class of transformers that opens a model.

    Args:
        model_type: ``model_type`` of its config.
        architecture: Name of its own class.
    """
    from transformers.models.auto import modeling_auto

    for table, known in KNOWN.items():
        names = getattr(modeling_auto, table, {}).get(model_type) or ()
        if architecture in ([names] if isinstance(names, str) else names):
            return known
    return AutoClass("AutoModel", "feature-extraction")
