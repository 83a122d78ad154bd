"""The settings of one run: what each key means, its default and its range.

One TOML file has the tables [trainer], [predictor] and [monitor]; all nodes validate all of it
before anything starts, which is why the three live together. Reading and writing: common/config.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.control_settings import ControlSettings
from common.setting import setting, table

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    layers: int = setting(4, "transformer blocks", low=1, high=256)
    heads: int = setting(4, "attention heads; must divide width", low=1, high=256)
    width: int = setting(128, "embedding width", low=8, high=65536)
    context_tokens: int = setting(128, "tokens per training window", low=2, high=1 << 20)
    vocabulary_size: int = setting(
        1024, "BPE vocabulary; at least 257 (256 bytes and <end>)", low=257, high=1 << 18
    )
    dropout: float = setting(0.0, "dropout probability in training", low=0.0, high=0.9)
    tied_head: bool = setting(False, "output head shares the embedding's weights, as in GPT-2")
    channels: int = setting(16, "channels of the first convolution (digits task)", low=1, high=1024)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    path: str = setting(
        "", "file, folder or git repository; empty = the Python standard library's own source"
    )
    suffixes: tuple[str, ...] = setting(
        (), "take only files with these suffixes from a folder; empty = all text"
    )
    validation_share: float = setting(
        0.05, "share of the files' bytes held out, by file", low=0.001, high=0.5
    )
    max_bytes: int = setting(64 * MIB, "stop collecting text here", low=1024, high=1 << 40)
    packing: str = setting(
        "stream", "document = no token sees another document (text)", choices=("stream", "document")
    )
    cache_dir: str = setting("", "tokens and vocabulary; empty = ~/.cache/hybrid-predict-trainer")


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    sequences: int = setting(16, "windows (or images) per micro-batch", low=1, high=1 << 20)
    accumulation: int = setting(1, "micro-batches per step", low=1, high=1 << 16)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    name: str = setting(
        "muon",
        "muon = Muon for hidden matrices, AdamW for the rest; which one when: docs/optimizers.md",
        choices=("adamw", "adamw8bit", "lion", "muon", "sgd"),
    )
    rate: float = setting(
        1e-2, "peak learning rate; Lion wants a tenth of AdamW's, SGD ten times as much", low=0.0, high=10.0
    )
    muon_rate: float = setting(1e-2, "peak learning rate of Muon", low=0.0, high=10.0)
    beta1: float = setting(
        0.9, "first-moment decay; Lion: interpolation, SGD: momentum", low=0.0, high=0.9999
    )
    beta2: float = setting(0.95, "second-moment decay; Lion: momentum decay", low=0.0, high=0.99999)
    nesterov: bool = setting(True, "sgd: Nesterov's form of the momentum")
    muon_momentum: float = setting(0.95, "Muon momentum", low=0.0, high=0.9999)
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices; SGD: L2", low=0.0, high=10.0)
    clip_norm: float = setting(1.0, "gradient clipping by global L2 norm; 0 = off", low=0.0, high=1e6)


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    name: str = setting(
        "wsd", "learning-rate schedule", choices=("constant", "cosine", "linear", "one-cycle", "wsd")
    )
    warmup_steps: int = setting(
        40, "rise of the rate: a line; one-cycle: half a cosine, commonly 30 % of steps", low=0, high=1 << 40
    )
    decay_share: float = setting(0.2, "wsd: share of the steps spent decaying", low=0.0, high=1.0)
    final_share: float = setting(0.0, "rate at the last step as a share of the peak", low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class BasisSettings:
    average_steps: int = setting(
        20, "time constant of the averaged weights, steps; 0 = no averaging", low=0, high=1 << 20
    )
    average_every_steps: int = setting(
        8, "steps that an average takes in at once, with their whole weight (fp32; bf16: 1)", low=1, high=1024
    )
    slow_momentum: float = setting(0.6, "decay of the slow drift per window", low=0.0, high=0.9999)
    dtype: str = setting(
        "fp32",
        "storage of the directions; bf16 halves it and suits windows up to about 100 steps",
        choices=("fp32", "bf16"),
    )
    average_share: float = setting(
        0.0,
        "the time constant grows: this share of the steps done so far, where that is more than average_steps",
        low=0.0,
        high=1.0,
    )
    history_snapshots: int = setting(
        0,
        "former weights held for the per-weight forecaster, one a window; 0 = no forecaster",
        low=0,
        high=64,
    )
    history_sample: int = setting(
        512, "weights per group whose past the forecaster learns from", low=16, high=1 << 16
    )
    ablation: str = setting(
        "none", "random = every delta becomes a random direction of the same norm", choices=("none", "random")
    )
    sample_size: int = setting(
        4096, "weights per group used for projections and cosines", low=16, high=1 << 22
    )


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    enabled: bool = setting(True, "false = jumps are neither checked nor judged: for races only")
    guard_batches: int = setting(1, "held-back training batches that judge a jump", low=1, high=1024)
    ruin_share: float = setting(
        0.5,
        "ruin bound: this share of the way back from the present loss to the first one",
        low=0.01,
        high=1.0,
    )
    tolerance: float = setting(
        1.0, "spreads of the no-jump forecast by which a kept jump may be worse", low=0.0, high=100.0
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    every_steps: int = setting(50, "steps between checkpoints; 0 = only at the end", low=0, high=1 << 40)
    hours_between_failures: float = setting(
        0.0,
        "above 0: Young's interval for this mean time between failures, from the measured cost of a"
        " checkpoint, at most 3.5 % of the time; every_steps holds before, and in lockstep; 0 = off",
        low=0.0,
        high=1e6,
    )
    keep: int = setting(3, "newest checkpoints kept, besides best and emergency", low=1, high=10_000)
    staging: str = setting(
        "auto",
        "what a checkpoint is captured in; memory = host memory of its size, kept (pinned on a GPU): the"
        " shortest pause; disk = its files; auto = memory where that is at most an eighth of what is free",
        choices=("auto", "memory", "disk"),
    )
    snapshot: str = setting(
        "auto",
        "where the state before a jump and the parked part of the basis live; auto = pinned host memory on a"
        " GPU, a file on CPU",
        choices=("auto", "memory", "disk"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SpikeSettings:
    enabled: bool = setting(
        True, "a loss that has left its bounds: back to a checkpoint from before, past the batches since"
    )
    steps: int = setting(8, "losses in a row that must all be out of bounds", low=4, high=32)
    deviations: float = setting(
        10.0, "bound: this many deviations above the median of the steps before ...", low=3.0, high=1e6
    )
    share: float = setting(
        0.25, "... and this share of the way back from there to the first loss", low=0.0, high=10.0
    )
    max_rollbacks: int = setting(3, "times in a row; then the run stops", low=1, high=1000)


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    kind: str = setting(
        "none", "under torchrun: ddp = whole copies, fsdp = shards", choices=("none", "ddp", "fsdp")
    )
    cpu_offload: bool = setting(False, "fsdp: shards and optimizer state live in host memory")
    compression: str = setting("none", "ddp: what gradients travel as", choices=("none", "powersgd"))
    compression_rank: int = setting(2, "powersgd: of the matrices that travel", low=1, high=1024)
    compression_after_steps: int = setting(1000, "powersgd: steps before it begins", low=2, high=1 << 40)


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    task: str = setting("language", "built-in task", choices=("language", "digits", "regression"))
    steps: int = setting(1000, "real steps that are kept", low=1, high=1 << 40)
    seed: int = setting(0, "of weights, data order and samples", low=0, high=(1 << 31) - 1)
    device: str = setting("auto", "auto = a GPU when there is one", choices=("auto", "cpu", "cuda"))
    threads: int = setting(0, "CPU threads of torch; 0 = torch's choice", low=0, high=4096)
    precision: str = setting("fp32", "bf16 = autocast on GPU", choices=("fp32", "bf16"))
    compile: bool = setting(False, "torch.compile: the model on GPU, jumps over large parameters on both")
    memory_fraction: float = setting(
        0.0,
        "of the GPU's memory, at which torch says out of memory: for a shared GPU; 0 = all",
        low=0.0,
        high=1.0,
    )
    decision_mode: str = setting("live", "lockstep waits for every decision", choices=("live", "lockstep"))
    decision_wait_share: float = setting(
        0.25, "live: longest wait at a decision point, in steps", low=0.0, high=100.0
    )
    statistics_steps: int = setting(64, "length of the WARMUP phase", low=1, high=1 << 40)
    window_steps: int = setting(16, "real steps of a FULL window", low=2, high=1 << 20)
    probation_steps: int = setting(16, "real steps of CORRECT", low=1, high=1 << 20)
    read_out: str = setting(
        "weights",
        "weights evaluated and kept at the end; average = the averaged ones if the guard batches agree",
        choices=("weights", "average"),
    )
    evaluate_every_steps: int = setting(50, "steps between held-out losses", low=1, high=1 << 40)
    evaluation_batches: int = setting(8, "held-out batches per evaluation", low=1, high=1 << 20)
    model: ModelSettings = table(ModelSettings)
    data: DataSettings = table(DataSettings)
    batch: BatchSettings = table(BatchSettings)
    optimizer: OptimizerSettings = table(OptimizerSettings)
    schedule: ScheduleSettings = table(ScheduleSettings)
    basis: BasisSettings = table(BasisSettings)
    verify: VerifySettings = table(VerifySettings)
    checkpoint: CheckpointSettings = table(CheckpointSettings)
    spikes: SpikeSettings = table(SpikeSettings)
    parallel: ParallelSettings = table(ParallelSettings)
    controls: ControlSettings = table(ControlSettings)


@dataclass(frozen=True, kw_only=True)
class PredictorSettings:
    enabled: bool = setting(True, "false = plain training, observed but never jumped")
    policy: str = setting(
        "learned",
        "how decisions are made: world model and bandit, or a fixed rule",
        choices=("learned", "fixed"),
    )
    temper: str = setting(
        "balanced",
        "learned: how much is risked (predictor_node/tempers.py)",
        choices=("conservative", "balanced", "aggressive"),
    )
    horizon_steps: tuple[int, ...] = setting((5, 10, 15), "horizons proposed in turn", low=1, high=10_000)
    drift_gain: float = setting(0.5, "share of the drift that a line fit trusts", low=-10.0, high=10.0)
    slow_gain: float = setting(0.0, "the same for the slow drift", low=-10.0, high=10.0)
    pull_back: float = setting(0.0, "share of the way back to the averaged weights", low=-1.0, high=1.0)
    rest_windows: int = setting(2, "windows after WARMUP without proposals", low=0, high=1 << 20)
    learn_share: float = setting(
        0.005, "learned: floating-point work of learning, as a share of the trainer's", low=0.0, high=10.0
    )
    chunk_steps: int = setting(
        0,
        "learned: a jump is applied in parts of this many virtual steps, checked in between; 0 = at once",
        low=0,
        high=10_000,
    )
    correction_share: float = setting(
        0.0, "learned: share of the parabola's correction after the first CORRECT step", low=0.0, high=1.0
    )
    control_share: float = setting(
        0.1, "of the run's work, what trying controls may cost at most", low=0.0, high=1.0
    )
    state: str = setting("", "learned: a state of an earlier run to start from (predictor-node fit)")


@dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    sample_seconds: float = setting(1.0, "between memory samples", low=0.05, high=3600.0)
    heartbeat_seconds: float = setting(0.5, "between heartbeats of every node", low=0.05, high=60.0)
    silent_seconds: float = setting(
        3.0, "without heartbeat until a node counts as lost", low=0.2, high=3600.0
    )
    cleanup_bytes: int = setting(
        0, "memory level that orders a clean-up; 0 = cleanup_share", low=0, high=1 << 50
    )
    emergency_bytes: int = setting(
        0, "memory level of the emergency checkpoint; 0 = emergency_share", low=0, high=1 << 50
    )
    cleanup_share: float = setting(0.0, "of the device memory; 0 = by its size", low=0.0, high=1.0)
    emergency_share: float = setting(0.0, "of the device memory; 0 = by its size", low=0.0, high=1.0)
    cleanup_every_steps: int = setting(
        0, "also a clean-up every so many steps, whatever the level; 0 = never", low=0, high=1 << 40
    )
    grow_back_steps: int = setting(
        200, "steps without pressure after which the newest memory order is taken back", low=1, high=1 << 40
    )
    device: str = setting("", "whose memory: auto, cpu, cuda or fake:SCRIPT (fake:demo); empty = the run's")
    http: str = setting("127.0.0.1:0", "address of the live page; port 0 = any free one; empty = no page")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    trainer: TrainerSettings = table(TrainerSettings)
    predictor: PredictorSettings = table(PredictorSettings)
    monitor: MonitorSettings = table(MonitorSettings)
