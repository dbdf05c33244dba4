"""
C++ engine of pyctrlora. Use the classes of the package instead.
"""

from __future__ import annotations
import collections.abc
import torch
import typing

__all__: list[str] = [
    "BUILT_WITH_TORCH",
    "Capture",
    "CgInit",
    "CgInitOptions",
    "Engine",
    "FactorSketch",
    "GaugeMap",
    "GroupSettings",
    "HeadCapture",
    "HeadSlot",
    "HutchinsonProbe",
    "LayerInit",
    "LayerPlan",
    "LoraPair",
    "LowRankEigen",
    "ObservationSlot",
    "Options",
    "RankEvent",
    "RankLayer",
    "RankOptions",
    "RankRules",
    "RankSchedule",
    "RankUtilities",
    "STATE_VERSION",
    "StepVerdict",
    "TrustRegionSolution",
    "TrustRegionSubproblem",
    "VERSION",
    "allocate_ranks",
    "allocated_parameters",
    "balance",
    "budget_from_fraction",
    "check_budget",
    "find_head",
    "find_pair",
    "find_slot",
    "lora_delta",
    "lora_linear",
    "plan_ranks",
    "register_head",
    "register_pair",
    "shift_base",
    "unregister_head",
    "unregister_pair",
    "used_parameters",
]

class Options:
    """
    Settings shared by all layers of one engine.
    """

    basis_dtype: str
    curvature: str
    loss_reduction: str
    master_weights: bool
    maximize: bool
    overlap: str
    step_length: str
    def __init__(self) -> None: ...
    def validate(self) -> None: ...
    @property
    def balance_every(self) -> int: ...
    @balance_every.setter
    def balance_every(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def beta1(self) -> float: ...
    @beta1.setter
    def beta1(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def curvature_decay(self) -> float: ...
    @curvature_decay.setter
    def curvature_decay(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def damping(self) -> float: ...
    @damping.setter
    def damping(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def dense_limit(self) -> int: ...
    @dense_limit.setter
    def dense_limit(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def exchange_every(self) -> int: ...
    @exchange_every.setter
    def exchange_every(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def factor_beta(self) -> float: ...
    @factor_beta.setter
    def factor_beta(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def factor_every(self) -> int: ...
    @factor_every.setter
    def factor_every(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def factor_warmup_steps(self) -> int: ...
    @factor_warmup_steps.setter
    def factor_warmup_steps(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def fallback_lr(self) -> float: ...
    @fallback_lr.setter
    def fallback_lr(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def gram_floor(self) -> float: ...
    @gram_floor.setter
    def gram_floor(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def head_radius(self) -> float: ...
    @head_radius.setter
    def head_radius(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def head_step(self) -> float: ...
    @head_step.setter
    def head_step(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def hutchinson_every(self) -> int: ...
    @hutchinson_every.setter
    def hutchinson_every(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def kl_radius(self) -> float: ...
    @kl_radius.setter
    def kl_radius(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def loss_scale(self) -> float: ...
    @loss_scale.setter
    def loss_scale(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def loss_terms(self) -> int: ...
    @loss_terms.setter
    def loss_terms(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def max_misses(self) -> int: ...
    @max_misses.setter
    def max_misses(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def max_staleness(self) -> int: ...
    @max_staleness.setter
    def max_staleness(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def ratio_every(self) -> int: ...
    @ratio_every.setter
    def ratio_every(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def rms_beta(self) -> float: ...
    @rms_beta.setter
    def rms_beta(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def sample_rows(self) -> int: ...
    @sample_rows.setter
    def sample_rows(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def seed(self) -> int: ...
    @seed.setter
    def seed(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def sketch_rank(self) -> int: ...
    @sketch_rank.setter
    def sketch_rank(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def whitening(self) -> float: ...
    @whitening.setter
    def whitening(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...

class GroupSettings:
    """
    Settings of one parameter group at one step.
    """
    def __init__(
        self,
        lr: typing.SupportsFloat | typing.SupportsIndex,
        initial_lr: typing.SupportsFloat | typing.SupportsIndex,
        weight_decay: typing.SupportsFloat | typing.SupportsIndex = 0.0,
        beta1: typing.SupportsFloat | typing.SupportsIndex = 0.9,
        beta2: typing.SupportsFloat | typing.SupportsIndex = 0.999,
        eps: typing.SupportsFloat | typing.SupportsIndex = 1e-08,
    ) -> None: ...
    @property
    def beta1(self) -> float: ...
    @beta1.setter
    def beta1(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def beta2(self) -> float: ...
    @beta2.setter
    def beta2(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def eps(self) -> float: ...
    @eps.setter
    def eps(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def initial_lr(self) -> float: ...
    @initial_lr.setter
    def initial_lr(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def lr(self) -> float: ...
    @lr.setter
    def lr(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def weight_decay(self) -> float: ...
    @weight_decay.setter
    def weight_decay(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...

class LoraPair:
    """
    One adapter: W = W0 + scaling * b @ a.
    """
    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: typing.SupportsFloat | typing.SupportsIndex,
        name: str,
    ) -> None: ...
    def validate(self) -> None: ...
    @property
    def a(self) -> torch.Tensor:
        """
        (r, n)
        """
    @property
    def b(self) -> torch.Tensor:
        """
        (m, r)
        """
    @property
    def name(self) -> str: ...
    @property
    def scaling(self) -> float: ...

class Capture:
    """
    A forward waiting for its backward.
    """
    def complete(self, output_grad: torch.Tensor) -> None: ...

class ObservationSlot:
    """
    One layer's channel to the engine.
    """
    def capture(self, inputs: torch.Tensor, base_output: torch.Tensor | None) -> Capture: ...
    @property
    def handle(self) -> int: ...
    @property
    def observations(self) -> int: ...
    @property
    def wanted(self) -> bool: ...

class HeadCapture:
    """
    A forward of a head, before its backward.
    """
    def complete(self, output_grad: torch.Tensor) -> None: ...

class HeadSlot:
    """
    A head's channel to the engine.
    """
    def capture(self, inputs: torch.Tensor, outputs: torch.Tensor) -> HeadCapture: ...
    @property
    def handle(self) -> int: ...
    @property
    def wanted(self) -> bool: ...

class FactorSketch:
    """
    Sums over rows that one batch adds to a factor.
    """
    @property
    def product(self) -> torch.Tensor:
        """
        (L, d, k)
        """
    @property
    def trace(self) -> torch.Tensor:
        """
        (L)
        """
    @property
    def weight(self) -> torch.Tensor:
        """
        (L)
        """

class LowRankEigen:
    """
    U diag(e) U^T + rho (I - U U^T) per layer.
    """
    def __init__(
        self,
        layers: typing.SupportsInt | typing.SupportsIndex,
        size: typing.SupportsInt | typing.SupportsIndex,
        sketch_rank: typing.SupportsInt | typing.SupportsIndex,
        like: torch.Tensor,
    ) -> None: ...
    def apply_power(
        self,
        v: torch.Tensor,
        exponent: typing.SupportsFloat | typing.SupportsIndex,
        damping: typing.SupportsFloat | typing.SupportsIndex,
    ) -> torch.Tensor: ...
    def captured_share(self) -> torch.Tensor: ...
    def sketch(self, rows: torch.Tensor, row_weights: torch.Tensor) -> FactorSketch: ...
    def start_basis(
        self,
        rows: torch.Tensor,
        where: torch.Tensor,
        seed: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def tail(self) -> torch.Tensor: ...
    def to_dense(self) -> torch.Tensor: ...
    def update(
        self, sketch: FactorSketch, keep: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor: ...
    @property
    def basis(self) -> torch.Tensor: ...
    @property
    def eigenvalues(self) -> torch.Tensor: ...
    @property
    def trace(self) -> torch.Tensor: ...

class TrustRegionSolution:
    @property
    def iterations(self) -> torch.Tensor:
        """
        (L)
        """
    @property
    def model_decrease(self) -> torch.Tensor:
        """
        (L)
        """
    @property
    def multiplier(self) -> torch.Tensor:
        """
        (L)
        """
    @property
    def step(self) -> torch.Tensor:
        """
        (L, m, n)
        """

class TrustRegionSubproblem:
    """
    min <G, D> + 1/2 <D, S D Omega> s.t. |D|_F <= radius
    """
    def __init__(
        self,
        gradient: torch.Tensor,
        output_eigenvalues: torch.Tensor,
        input_eigenvalues: torch.Tensor,
    ) -> None: ...
    def solve(
        self,
        radius: torch.Tensor,
        tolerance: typing.SupportsFloat | typing.SupportsIndex = 1e-12,
        max_iterations: typing.SupportsInt | typing.SupportsIndex = 50,
    ) -> TrustRegionSolution: ...

class GaugeMap:
    """
    A <- map A, B <- B inverse.
    """
    @property
    def inverse(self) -> torch.Tensor:
        """
        (L, r, r)
        """
    @property
    def map(self) -> torch.Tensor:
        """
        (L, r, r)
        """
    @property
    def ok(self) -> torch.Tensor:
        """
        (L)
        """
    @property
    def sigma(self) -> torch.Tensor:
        """
        (L, r)
        """

class RankRules:
    """
    What a plan of ranks must keep to.
    """
    def __init__(
        self,
        min_rank: typing.SupportsInt | typing.SupportsIndex = 1,
        hysteresis: typing.SupportsFloat | typing.SupportsIndex = 1.25,
        max_move: typing.SupportsFloat | typing.SupportsIndex = 0.3,
    ) -> None: ...
    def validate(self) -> None: ...
    @property
    def hysteresis(self) -> float: ...
    @property
    def max_move(self) -> float: ...
    @property
    def min_rank(self) -> int: ...

class RankSchedule:
    """
    When ranks change, in fractions of the training.
    """
    def __init__(
        self,
        total_steps: typing.SupportsInt | typing.SupportsIndex,
        first: typing.SupportsFloat | typing.SupportsIndex = 0.05,
        every: typing.SupportsFloat | typing.SupportsIndex = 0.02,
        last: typing.SupportsFloat | typing.SupportsIndex = 0.9,
        min_steps: typing.SupportsInt | typing.SupportsIndex = 8,
        descend: bool = False,
    ) -> None: ...
    def budget_at(
        self,
        steps: typing.SupportsInt | typing.SupportsIndex,
        budget: typing.SupportsInt | typing.SupportsIndex,
        allocated: typing.SupportsInt | typing.SupportsIndex,
    ) -> int: ...
    def due(self, steps: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def first_event(self) -> int: ...
    def interval(self) -> int: ...
    def last_event(self) -> int: ...
    def validate(self) -> None: ...
    @property
    def descend(self) -> bool: ...
    @property
    def total_steps(self) -> int: ...

class RankLayer:
    """
    What the rank scheduler knows of one layer.
    """
    def __init__(
        self,
        name: str,
        out_features: typing.SupportsInt | typing.SupportsIndex,
        in_features: typing.SupportsInt | typing.SupportsIndex,
        allocated: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def cost(self) -> int: ...
    @property
    def allocated(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def out_features(self) -> int: ...

class RankOptions:
    """
    A budget and how an engine keeps to it.
    """
    def __init__(
        self,
        budget: typing.SupportsInt | typing.SupportsIndex,
        schedule: RankSchedule,
        rules: RankRules,
        window: typing.SupportsInt | typing.SupportsIndex = 40,
        candidates: typing.SupportsInt | typing.SupportsIndex = 8,
    ) -> None: ...
    def validate(self) -> None: ...
    @property
    def budget(self) -> int: ...
    @property
    def rules(self) -> RankRules: ...
    @property
    def schedule(self) -> RankSchedule: ...

class RankUtilities:
    """
    Utilities of one layer, in units of the loss.
    """
    def __init__(
        self,
        existing: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
        fresh: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
    ) -> None: ...
    @property
    def existing(self) -> list[float]: ...
    @property
    def fresh(self) -> list[float]: ...

class LayerPlan:
    """
    What an event does to one layer.
    """
    @property
    def dropped(self) -> list[int]: ...
    @property
    def from_rank(self) -> int: ...
    @property
    def grown(self) -> list[int]: ...
    @property
    def to_rank(self) -> int: ...
    @property
    def utility(self) -> float: ...

class RankEvent:
    """
    A layer whose directions change.
    """
    @property
    def from_rank(self) -> int: ...
    @property
    def layer(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def to_rank(self) -> int: ...
    @property
    def utility(self) -> float: ...

class StepVerdict:
    """
    What a checked step deserves.

    Members:

      accept

      reject

      invalid
    """

    __members__: typing.ClassVar[dict[str, StepVerdict]]
    accept: typing.ClassVar[StepVerdict]
    invalid: typing.ClassVar[StepVerdict]
    reject: typing.ClassVar[StepVerdict]
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class HutchinsonProbe:
    """
    Traces of the Hessian's diagonal blocks.
    """
    def __init__(
        self,
        pairs: collections.abc.Sequence[LoraPair],
        seed: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def differentiate(self, loss: torch.Tensor) -> None: ...
    def direction_a(self, layer: typing.SupportsInt | typing.SupportsIndex) -> torch.Tensor: ...
    def direction_b(self, layer: typing.SupportsInt | typing.SupportsIndex) -> torch.Tensor: ...
    def restore(self) -> None: ...
    def shift(self, sign: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def step(self) -> float: ...
    def take(self) -> None: ...
    def traces(self) -> torch.Tensor: ...

class Engine:
    """
    All layers, one step.
    """
    def __init__(self, options: Options) -> None: ...
    def add_fallback(
        self,
        params: collections.abc.Sequence[torch.Tensor],
        group: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def add_pairs(
        self,
        pairs: collections.abc.Sequence[LoraPair],
        group: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def allocate_ranks(
        self,
        utilities: collections.abc.Mapping[
            str, collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex]
        ],
    ) -> None: ...
    def begin_trial(self) -> None: ...
    def curvature(self) -> dict[str, tuple[float, float]]: ...
    def drop_observations(self) -> None: ...
    def end_trial(
        self,
        before: typing.SupportsFloat | typing.SupportsIndex,
        after: typing.SupportsFloat | typing.SupportsIndex,
    ) -> StepVerdict: ...
    def enter_traces(
        self, traces: collections.abc.Mapping[str, typing.SupportsFloat | typing.SupportsIndex]
    ) -> None: ...
    def layout(self) -> list[list[str]]: ...
    def load(self, tensors: collections.abc.Mapping[str, torch.Tensor]) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def named_tensors(self) -> dict[str, torch.Tensor]: ...
    def observe(self, on: bool) -> None: ...
    def probe_due(self) -> bool: ...
    def rank_events(self) -> list[RankEvent]: ...
    def rank_history(self) -> list[tuple[int, list[int]]]: ...
    def ranks(self) -> dict[str, int]: ...
    def ratio_due(self) -> bool: ...
    def retired(self) -> list[str]: ...
    def schedule_ranks(self, ranks: RankOptions) -> None: ...
    def set_loss_scale(self, loss_scale: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    def set_processes(
        self,
        all_reduce: collections.abc.Callable[[collections.abc.Sequence[torch.Tensor]], None],
        rank: typing.SupportsInt | typing.SupportsIndex,
        count: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def state_bytes(self) -> int: ...
    def step(self, settings: collections.abc.Sequence[GroupSettings]) -> None: ...
    def steps(self) -> int: ...

class CgInitOptions:
    """
    Settings of one calibration.
    """

    zero_b: bool
    def __init__(self) -> None: ...
    def validate(self) -> None: ...
    @property
    def batches(self) -> int: ...
    @batches.setter
    def batches(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def damping(self) -> float: ...
    @damping.setter
    def damping(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def dense_limit(self) -> int: ...
    @dense_limit.setter
    def dense_limit(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def deviations(self) -> float: ...
    @deviations.setter
    def deviations(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def init_radius(self) -> float: ...
    @init_radius.setter
    def init_radius(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def probes(self) -> int: ...
    @probes.setter
    def probes(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def seed(self) -> int: ...
    @seed.setter
    def seed(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def sketch_rank(self) -> int: ...
    @sketch_rank.setter
    def sketch_rank(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def whitening(self) -> float: ...
    @whitening.setter
    def whitening(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...

class LayerInit:
    """
    Start values of one layer.
    """
    @property
    def a(self) -> torch.Tensor:
        """
        (r, n)
        """
    @property
    def b(self) -> torch.Tensor:
        """
        (m, r)
        """
    @property
    def effective_samples(self) -> float: ...
    @property
    def energy_kept(self) -> float: ...
    @property
    def kept(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def noise_floor(self) -> float: ...
    @property
    def radius(self) -> float: ...
    @property
    def rows(self) -> int: ...
    @property
    def spectrum(self) -> torch.Tensor: ...
    @property
    def split_half(self) -> torch.Tensor: ...

class CgInit:
    """
    One calibration pass.
    """
    def __init__(
        self, pairs: collections.abc.Sequence[LoraPair], options: CgInitOptions
    ) -> None: ...
    def apply(self, layers: collections.abc.Sequence[LayerInit]) -> None: ...
    def bytes(self) -> int: ...
    def end_batch(self) -> int: ...
    def finish(self) -> list[LayerInit]: ...
    def load(self, tensors: collections.abc.Mapping[str, torch.Tensor]) -> None: ...
    def named_tensors(self) -> dict[str, torch.Tensor]: ...
    def release(self) -> None: ...

def allocate_ranks(
    layers: collections.abc.Sequence[RankLayer],
    utilities: collections.abc.Sequence[
        collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex]
    ],
    budget: typing.SupportsInt | typing.SupportsIndex,
    rules: RankRules,
) -> list[int]: ...
def allocated_parameters(layers: collections.abc.Sequence[RankLayer]) -> int: ...
def balance(gram_b: torch.Tensor, gram_a: torch.Tensor) -> GaugeMap: ...
def budget_from_fraction(
    layers: collections.abc.Sequence[RankLayer],
    fraction: typing.SupportsFloat | typing.SupportsIndex,
    rules: RankRules,
) -> int: ...
def check_budget(
    layers: collections.abc.Sequence[RankLayer],
    budget: typing.SupportsInt | typing.SupportsIndex,
    rules: RankRules,
) -> None: ...
def find_head(weight: torch.Tensor) -> HeadSlot: ...
def find_pair(tensor: torch.Tensor) -> LoraPair | None: ...
def find_slot(tensor: torch.Tensor) -> ObservationSlot: ...
def lora_delta(
    inputs: torch.Tensor,
    base_output: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: typing.SupportsFloat | typing.SupportsIndex,
    slot: ObservationSlot,
) -> torch.Tensor: ...
def lora_linear(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: typing.SupportsFloat | typing.SupportsIndex,
    slot: ObservationSlot,
    transposed: bool,
) -> torch.Tensor: ...
def plan_ranks(
    layers: collections.abc.Sequence[RankLayer],
    utilities: collections.abc.Sequence[RankUtilities],
    budget: typing.SupportsInt | typing.SupportsIndex,
    rules: RankRules,
) -> list[LayerPlan]: ...
def register_head(weight: torch.Tensor) -> HeadSlot: ...
def register_pair(pair: LoraPair) -> ObservationSlot: ...
def shift_base(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: typing.SupportsFloat | typing.SupportsIndex,
    transposed: bool,
) -> None: ...
def unregister_head(weight: torch.Tensor) -> None: ...
def unregister_pair(tensor: torch.Tensor) -> None: ...
def used_parameters(
    layers: collections.abc.Sequence[RankLayer],
    ranks: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
) -> int: ...

BUILT_WITH_TORCH: str = "2.13.0"
STATE_VERSION: int = 4
VERSION: str = "0.1.0"
