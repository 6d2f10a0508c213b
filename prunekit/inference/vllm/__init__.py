"""vLLM plugin that serves compressed checkpoints.

vLLM calls :func:`register` in each of its processes, perhaps twice, whatever model it serves. So
this module imports nothing, and what it registers imports formats and kernels only when a
checkpoint of prunekit is opened.

Tried with vLLM 0.32.0; read beside the sources of 0.33.0, where nothing that it uses differs.
"""


def register() -> None:
    """Register the storage formats of prunekit as a quantization method of vLLM."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from prunekit.inference.vllm.quantization import METHOD, SparseConfig

    register_quantization_config(METHOD)(SparseConfig)
