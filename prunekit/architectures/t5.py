"""T5: an encoder and a decoder with cross-attention.

Cross-attention reads the final hidden states of the encoder. The feed-forward has one input linear
(``wi``, T5 1.0) or a gate and an up projection (``wi_0``, ``wi_1``, T5 1.1).
"""

from prunekit.architectures.base import Architecture, Attention, FeedForward, Stack, Stage, Stream

SELF_ATTENTION = (
    Stage("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
    Stage("layer.0.SelfAttention.o"),
)
CROSS_ATTENTION = (
    Stage("layer.1.EncDecAttention.q"),
    Stage("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
    Stage("layer.1.EncDecAttention.o"),
)


def _attention(at: str, bias: str) -> Attention:
    return Attention(
        module=at,
        query=f"{at}.q",
        key=f"{at}.k",
        value=f"{at}.v",
        output=f"{at}.o",
        size="key_value_proj_dim",
        counts=(("n_heads", "heads"), ("inner_dim", "width")),
        entries=(("num_heads", "heads"), ("d_kv", "size")),
        bias=bias,
    )


def _inputs(at: str) -> tuple[str, ...]:
    return tuple(f"{at}.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1"))


def _neurons(at: str) -> FeedForward:
    return FeedForward(inputs=_inputs(at), output=f"{at}.DenseReluDense.wo", entry="d_ff")


SELF_HEADS = _attention("layer.0.SelfAttention", "relative_attention_bias")
CROSS_HEADS = _attention("layer.1.EncDecAttention", "")


def _feed_forward(at: str) -> tuple[tuple[Stage, ...], frozenset[str]]:
    """Return the feed-forward stages and the linears that are optional."""
    inputs = _inputs(at)
    return (Stage(*inputs), Stage(f"{at}.DenseReluDense.wo")), frozenset(inputs)


ENCODER_FEED_FORWARD, ENCODER_OPTIONAL = _feed_forward("layer.1")
DECODER_FEED_FORWARD, DECODER_OPTIONAL = _feed_forward("layer.2")

T5 = Architecture(
    model_types=("t5",),
    stacks=(
        Stack(
            blocks="encoder.block",
            stages=(*SELF_ATTENTION, *ENCODER_FEED_FORWARD),
            module="encoder",
            optional=ENCODER_OPTIONAL,
            attentions=(SELF_HEADS,),
            feed_forwards=(_neurons("layer.1"),),
        ),
        Stack(
            blocks="decoder.block",
            stages=(*SELF_ATTENTION, *CROSS_ATTENTION, *DECODER_FEED_FORWARD),
            module="decoder",
            reads="encoder",
            optional=DECODER_OPTIONAL,
            attentions=(SELF_HEADS, CROSS_HEADS),
            feed_forwards=(_neurons("layer.2"),),
            depth="num_decoder_layers",
        ),
    ),
    stream=Stream(
        epsilon="layer_norm_epsilon", divided=("scale_decoder_outputs", "tie_word_embeddings")
    ),
)
