"""`train`, `lr_scheduler`, `moe`, `mtp`: size and length of a run, and its recipe over tokens, as they are set."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BatchRampConfig:
    """`train.batch_ramp`: the global batch grows up to `train.global_batch_size`, linearly over the first tokens.

    It moves in jumps, to the largest size that the straight line has reached.

    Attributes:
        start: first batch size, in sequences; None is no ramp.
        tokens: tokens over which the batch grows, linearly.
        quantum: sequences by which it jumps.
    """

    start: int | None = None
    tokens: int = 0
    quantum: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """`train`: size and length of the run.

    At least one of `max_steps` and `max_tokens` is set. `max_tokens` is reached by whole batches: the last step is the
    first whose end lies at or past it.

    Attributes:
        seq_len: predicted tokens of a sequence.
        micro_batch_size: sequences of one forward and backward on a rank. Gradient accumulation follows from it:
            a step adds up the gradients of `train.global_batch_size` / (`parallel.dp` x `train.micro_batch_size`)
            micro-batches on each rank, and there is no key for their number.
        global_batch_size: sequences of a step over all ranks, gradient accumulation included; a multiple of
            `parallel.dp` x `train.micro_batch_size`.
        max_steps: end of the run in steps.
        max_tokens: end of the run in tokens; with both, whichever comes first.
        seed: draws the initial weights and the order of the data.
    """

    seq_len: int = 256
    micro_batch_size: int = 2
    global_batch_size: int = 16
    max_steps: int | None = 300
    max_tokens: int | None = None
    seed: int = 0
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)


@dataclass(frozen=True)
class LrPhaseConfig:
    """One stretch of the learning rate's curve, from where the phase before it ended.

    Its length is given in one way, by `tokens`, `until_tokens` or `share`. Only the last phase may leave it out.

    Attributes:
        kind: `constant`, `linear` or `cosine`.
        lr: rate at its start; None goes on from the phase before.
        end_lr: rate at its end, for `linear` and `cosine`.
        tokens: length in tokens.
        until_tokens: end on the run's axis of tokens, in the place of a length.
        share: length as a share of the run's tokens; the last phase may have none of the three and fills the run.
    """

    kind: str = "constant"
    lr: float | None = None
    end_lr: float | None = None
    tokens: int | None = None
    until_tokens: int | None = None
    share: float | None = None


def _default_phases() -> list[LrPhaseConfig]:
    """Hold, then fall along a cosine to a tenth of the default rate."""
    return [LrPhaseConfig("constant", share=0.5), LrPhaseConfig("cosine", end_lr=3e-4)]


@dataclass(frozen=True)
class LrSchedulerConfig:
    """`lr_scheduler`: the learning rate over the run's tokens, warm-up first, then phases.

    Attributes:
        lr: rate after warm-up.
        warmup_steps: steps from 0 to it, linear in tokens.
        phases: stretches of the curve, in order; `[]` is constant.
    """

    lr: float = 3e-3
    warmup_steps: int = 20
    phases: list[LrPhaseConfig] = field(default_factory=_default_phases)


@dataclass(frozen=True)
class MoeConfig:
    """`moe`: what balances the load of experts, devices and communication. Devices are the model's routing groups.

    Attributes:
        bias_update_rate: step of the routers' selection biases, once per training step. V3's 0.001 balances in about a
            thousand steps, which a short run does not have. Unless it is set it is 0 where `model.topk_method` is not
            `noaux_tc`, as routers have no bias then.
        bias_update_until_tokens: from here on the biases stay; None: never.
        seq_aux_coeff: alpha of the balance loss of experts within a sequence (V3's alpha, alpha 1 of V2 and
            DeepSeekMoE).
        device_aux_coeff: alpha 2: balance loss of devices, which are the `model.n_group` routing groups.
        comm_aux_coeff: alpha 3: balance loss of the tokens that each device receives, with M = `model.topk_group`.
    """

    bias_update_rate: float = 0.01
    bias_update_until_tokens: int | None = None
    seq_aux_coeff: float = 0.0001
    device_aux_coeff: float = 0.0
    comm_aux_coeff: float = 0.0


@dataclass(frozen=True)
class LossWeightChange:
    """A later value of the weight of multi-token prediction's loss.

    Attributes:
        from_tokens: the first step that begins here or later has the new value.
        loss_weight: the value.
    """

    from_tokens: int
    loss_weight: float


@dataclass(frozen=True)
class MtpConfig:
    """`mtp`: the loss of multi-token prediction.

    Attributes:
        loss_weight: lambda, the weight of the mean loss over all prediction depths.
        loss_weight_changes: later values of lambda, in order.
    """

    loss_weight: float = 0.3
    loss_weight_changes: list[LossWeightChange] = field(default_factory=list)
