"""The model: DeepSeek-V3 (multi-head latent attention, sparse experts, multi-token prediction) as plain modules.

Tensors are [B sequences, S positions, hidden] between layers and [T = B*S tokens, ...] inside them. Parallelism is
handed in (`moe.Dispatch`), arithmetic too (`precision.engine.Engine`, `kernels.Kernels`); nothing here knows of ranks.
"""
