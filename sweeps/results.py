"""What is known of the points of a sweep."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Result:
  """What is known of a point.

  Attributes:
    name: of the point, and of its folder, such as `beta=0.5,latent_dim=16`.
    values: its settings that vary, by config key, such as `objective.beta`.
    state: `complete`, `failed`, `pruned`, `running` or `waiting`.
    metrics: numbers about it by name, in the order in which they are read:
      `rate`, `distortion`, `elbo`, …; empty unless it is complete.
    units: of the metrics, by name.
    kl: nats of each latent dimension; empty unless it is complete.
    active: whether each of these is active.
    error: what made it fail, in a line.
  """

  name: str
  values: dict[str, object]
  state: str
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  units: dict[str, str] = dataclasses.field(default_factory=dict)
  kl: list[float] = dataclasses.field(default_factory=list)
  active: list[bool] = dataclasses.field(default_factory=list)
  error: str = ''
