"""What `verify` found, as plain frozen data.

Every writer (terminal, JSON, Markdown, JUnit, HTML) draws this one report.

The chain goes from the unmerged model (base + live adapters) over the merged safetensors to ONNX and its
further precisions; every step is compared with the same reference on the same inputs. Numbers are float64;
None means "not applicable" or "not finite". Nothing in a report names a path of the machine beyond the last
part of what was given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ia3_export.words import AppliedBy

SCHEMA = "ia3-export/report/1"
ArtifactKind = Literal["merged", "onnx"]
#: The gate that holds an artifact to what rounding explains.
MAX_ERROR = "max error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far one set of outputs is from another, over all inputs.

    Errors are absolute (largest, mean, root mean square), and relative for elements of at least 1e-3 of the
    largest reference value; ``ulp`` counts units in the last place of the step's precision at the reference
    value, for the same elements. ``kl`` (nats, mean and largest over rows), ``top1`` and ``top5`` (shares of
    rows) exist for logits only, ``perplexity_change`` (relative) for causal language models.
    """

    max_error: float
    mean_error: float
    rms_error: float
    max_relative: float
    mean_relative: float
    max_ulp: float
    mean_ulp: float
    cosine: float
    kl: float | None = None
    max_kl: float | None = None
    top1: float | None = None
    top5: float | None = None
    perplexity_change: float | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition of the verdict: ``value relation limit``, for example ``max error <= 1.2e-06``."""

    name: str
    value: float | None
    relation: Literal["<=", ">="]
    limit: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Discrimination:
    """How many times beyond its gates a wrong artifact would have been on the same inputs: the `base`, `half`
    of the adapters' strength, and the `nearest` of those that leave out one layer's vectors, which is called
    `nearest_name`. None where it was not run.
    """

    base: float | None
    half: float | None
    nearest: float | None
    nearest_name: str

    @property
    def least(self) -> float | None:
        """The smallest of them."""
        return min((f for f in (self.base, self.half, self.nearest) if f is not None), default=None)


@dataclass(frozen=True, slots=True)
class Generation:
    """Greedy decoding of `tokens` tokens in each of `sequences`, beside the reference.

    `first_divergence` counts generated tokens from 0, None when all agree; `margin` is the reference's logit
    distance there between its own choice and the artifact's, and `excused` tells that every such margin is
    within twice the error that the artifact may have, so that rounding may decide either way.
    """

    tokens: int
    sequences: int
    first_divergence: int | None
    margin: float | None
    excused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """Output of one module, in execution order: largest absolute `error` of the artifact, that of the
    `unmerged` model, and the `bound` (all against the reference, on the first input); `scale` is the largest
    reference value.
    """

    module: str
    scale: float
    unmerged: float
    error: float
    bound: float
    passed: bool


@dataclass(frozen=True, slots=True)
class FaultLocation:
    """The first module whose output leaves its bound, the site nearest to it (a module with a vector), and
    what the weights proof says of that site."""

    module: str
    site: str | None
    weights: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One artifact of the chain against the reference.

    `precision` is float64, float32, float16, bfloat16, int8, int4 or keep; `runs_on` names runtime and
    device. `distance` is to the reference, `loss` to the step before it (the unmerged model for the first),
    `library` to a quantized base with live adapters as its own library runs it (the reference being that base
    dequantized). `effect_present` is the share of the adapters' effect that the artifact shows: 1 is right, 0
    the base, 2 applied twice. `discrimination` says how far wrong artifacts would have been from passing.
    `error_histogram` pairs a power of ten n with the number of output elements whose error is in [10^n,
    10^(n+1)) of the largest reference value; (-99, count) are exact. `layers` is empty where modules cannot
    be observed (ONNX).
    """

    name: str
    kind: ArtifactKind
    file: str
    precision: str
    runs_on: str
    passed: bool
    finding: str
    gates: tuple[Gate, ...] = ()
    distance: Distance | None = None
    loss: Distance | None = None
    library: Distance | None = None
    effect_present: float | None = None
    discrimination: Discrimination | None = None
    generation: Generation | None = None
    error_histogram: tuple[tuple[int, int], ...] = ()
    layers: tuple[LayerError, ...] = ()
    location: FaultLocation | None = None

    @property
    def told_by(self) -> float | None:
        """How many times beyond the gates the nearest wrong artifact would have been."""
        return None if self.discrimination is None else self.discrimination.least

    @property
    def bound(self) -> float | None:
        """Limit of the gate `MAX_ERROR`; None where other gates judge."""
        return next((gate.limit for gate in self.gates if gate.name == MAX_ERROR), None)


@dataclass(frozen=True, slots=True)
class TensorFinding:
    """A tensor (or ONNX initializer, node) that is not what it must be: `what` in a word or three
    (``left out``, ``applied twice``, ``missing``, ...), `detail` in a sentence.
    """

    tensor: str
    what: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsProof:
    """The weights of one artifact, without any forward.

    `changed` tensors equal the fold of base and adapter bit for bit, `unchanged` ones the base's bytes;
    `findings` say which do not. For ONNX, `changed` and `unchanged` count initializers found equal to such
    tensors (transposed or not, widened or rounded to the graph's dtype), `computed` those that the exporter
    made itself, and `unproven` initializers of codes for which nothing was found to compare them with: only
    forwards judge them.
    """

    name: str
    kind: ArtifactKind
    file: str
    passed: bool
    changed: int
    unchanged: int
    computed: int = 0
    nbytes: int
    findings: tuple[TensorFinding, ...] = ()
    notes: tuple[str, ...] = ()
    unproven: int = 0

    @property
    def verdict(self) -> str:
        """``proven``, ``NOT proven``, or proven but for so many initializers of codes."""
        if not self.passed:
            return "NOT proven"
        return f"proven but for {self.unproven:,} initializers of codes" if self.unproven else "proven"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSummary:
    """One learned vector.

    `amplified`, `inhibited` count elements above and below 1 by more than 1 %, `inhibited` in magnitude;
    `negative` flips signs. `values` are at most 128: the element farthest from 1 of each stretch of channels.
    """

    adapter: str
    module: str
    direction: Literal["in", "out"]
    size: int
    minimum: float
    maximum: float
    mean: float
    amplified: int
    inhibited: int
    negative: int
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ModelId:
    """A base or an adapter: the hub id or the last part of its path."""

    id: str
    revision: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What the steps are compared with: vectors applied live by ``peft`` or by ``hooks``, in `precision`.

    `inputs` are the names of the forwards, `origin` says what they were made of. `unmerged` is how far the
    live model itself is from that in the stored `dtype`; `effect` is the largest change that the adapters
    make to the base's outputs, `scale` the largest reference output.
    """

    applied_by: AppliedBy
    model_class: str
    precision: str
    dtype: str
    runs_on: str
    inputs: tuple[str, ...]
    origin: str
    unmerged: Distance
    effect: float
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that `verify` found. `reference` is None and `steps` empty for ``--weights-only``."""

    in_parity: bool
    base: ModelId
    adapters: tuple[ModelId, ...]
    weights: tuple[WeightsProof, ...]
    reference: Reference | None
    steps: tuple[Step, ...]
    sites: tuple[SiteSummary, ...]
    options: Mapping[str, str]
    environment: Mapping[str, str]
    digests: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """``in parity`` or ``NOT in parity``."""
        return "in parity" if self.in_parity else "NOT in parity"

    def to_json(self) -> dict[str, Any]:
        """The JSON document (docs/report.schema.json). Numbers that are not finite become null."""
        content: dict[str, Any] = finite(asdict(self))
        return {"schema": SCHEMA, "verdict": self.verdict} | content


def to_text(report: Report) -> str:
    """`report` as JSON text, keys sorted."""
    return json.dumps(report.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """`value`, of mappings, lists and tuples, with None for NaN and infinity, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value
