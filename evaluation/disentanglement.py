"""How well the factors of variation can be read from a code.

A code is the posterior means of images, a factor what is known of them: a
factor that generated them, or an attribute that people gave them. Codes are
float [num_images, latent_dim], factors are class indices from 0, int
[num_images, num_factors]. Readers are fitted to the codes `*_train` and
scored on those of other images, `*_test`.

A factor of which either part has but one value cannot be scored. It is NaN in
results per factor, and left out of every mean.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.parallel import delayed
from sklearn.utils.parallel import Parallel

NUM_BINS = 20

# A code that varies no more than this is dead; as in Locatello et al. 2019.
_DEAD_VARIANCE = 1e-12


@dataclasses.dataclass(frozen=True)
class LinearProbe:
  """Shares of the held-out images, [num_factors] each.

  Attributes:
    accuracy: whose class was named.
    balanced_accuracy: the same as a mean over classes, whatever their sizes.
    majority_accuracy: accuracy without a code, of always naming the class
      that is most frequent in training; its balanced accuracy is 1 / classes.
    standard_errors: of the mean over factors of each of the three, over the
      choice of test images: an image's factors are not independent.
  """

  accuracy: np.ndarray
  balanced_accuracy: np.ndarray
  majority_accuracy: np.ndarray
  standard_errors: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class DCI:
  """The three scores of Eastwood & Williams 2018, and what they come from.

  Attributes:
    disentanglement: in [0, 1]; 1 where no code serves more than one factor.
    completeness: in [0, 1]; 1 where no factor needs more than one code.
    informativeness: held-out accuracy, the mean over factors. The paper gives
      the error, 1 minus this.
    importances: [latent_dim, num_factors]; each factor's sum to 1, or are 0
      where no code was of use.
    accuracy: held-out, [num_factors].
  """

  disentanglement: float
  completeness: float
  informativeness: float
  importances: np.ndarray
  accuracy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scores:
  """All that `evaluate` measures.

  Attributes:
    probe: of `linear_probe`.
    mig: of `mutual_information_gap`, [num_factors].
    dci: of `dci`.
    sap: of `sap`, [num_factors].
    sap_svm: of `sap_svm`, [num_factors].
  """

  probe: LinearProbe
  mig: np.ndarray
  dci: DCI
  sap: np.ndarray
  sap_svm: np.ndarray

  def means(self) -> dict[str, float]:
    """One number for each score, the mean over factors."""
    return {
      'linear_accuracy': mean(self.probe.accuracy),
      'linear_balanced_accuracy': mean(self.probe.balanced_accuracy),
      'majority_accuracy': mean(self.probe.majority_accuracy),
      'mig': mean(self.mig),
      'dci_disentanglement': self.dci.disentanglement,
      'dci_completeness': self.dci.completeness,
      'dci_informativeness': self.dci.informativeness,
      'sap': mean(self.sap),
      'sap_svm': mean(self.sap_svm),
    }


def evaluate(
  codes_train: np.ndarray,
  factors_train: np.ndarray,
  codes_test: np.ndarray,
  factors_test: np.ndarray,
  seed: int = 0,
) -> Scores:
  """Every score of this module; arguments are as the module describes them.

  10,000 training images are customary (Locatello et al. 2019), and 128 codes
  and 40 attributes of so many take minutes: the caller limits the number.
  `seed` is the forest's. The mutual information, which fits nothing, is that
  of the training images.
  """
  data = (codes_train, factors_train, codes_test, factors_test)
  return Scores(
    probe=linear_probe(*data),
    mig=mutual_information_gap(codes_train, factors_train),
    dci=dci(*data, seed=seed),
    sap=sap(*data),
    sap_svm=sap_svm(*data),
  )


def permute(
  factors_train: np.ndarray, factors_test: np.ndarray, seed: int | Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """The factors in a random order of the images of each part.

  `evaluate` of permuted factors gives the chance level of each score: codes
  and factors are independent, and how often each factor has each value, alone
  and together with the others, is unchanged.
  """
  generator = np.random.default_rng(seed)
  return generator.permutation(factors_train), generator.permutation(
    factors_test
  )


def mean(values: np.ndarray) -> float:
  """Mean over the factors that could be scored; NaN where there is none."""
  values = values[~np.isnan(values)]
  return float(values.mean()) if len(values) else np.nan


def varying(*factors: np.ndarray) -> np.ndarray:
  """Which factors have two values or more in each part, bool [num_factors]."""
  return np.all([np.ptp(part, axis=0) > 0 for part in factors], axis=0)


def linear_probe(
  codes_train: np.ndarray,
  factors_train: np.ndarray,
  codes_test: np.ndarray,
  factors_test: np.ndarray,
) -> LinearProbe:
  """What logistic regression on the standardised code says of each factor.

  It is multinomial, with scikit-learn's default L2 penalty, C = 1.
  """
  train, test, _ = _standardize(codes_train, codes_test)

  def probe(factor):
    labels, held_out = factors_train[:, factor], factors_test[:, factor]
    classifier = LogisticRegression(max_iter=1000).fit(train, labels)
    named = classifier.predict(test)
    right = named == held_out
    counts = np.bincount(held_out)
    recalls = np.bincount(held_out, weights=right) / np.maximum(counts, 1)
    weights = len(test) / counts[held_out] / np.sum(counts > 0)
    return (
      right,
      # Its mean is the balanced accuracy, and its variance the delta method's.
      balanced_accuracy(held_out, named)
      + weights * (right - recalls[held_out]),
      held_out == np.bincount(labels).argmax(),
    )

  scored = varying(factors_train, factors_test)
  values = np.full((3, *factors_test.shape), np.nan)
  for factor in np.flatnonzero(scored):
    values[:, :, factor] = probe(factor)
  errors = np.full(3, np.nan)
  if scored.any():
    by_image = values[:, :, scored].mean(axis=2)
    errors = by_image.std(axis=1, ddof=1) / np.sqrt(len(test))
  return LinearProbe(*values.mean(axis=1), tuple(errors.tolist()))


def mutual_information_gap(
  codes: np.ndarray, factors: np.ndarray
) -> np.ndarray:
  """MIG of each factor, [num_factors]; the MIG is their mean.

    (I(z_a; v) - I(z_b; v)) / H(v),

  with a and b the codes that tell most and second most of the factor v; Chen
  et al. 2018, equation 6. 1 means that one code tells all and no other tells
  anything. Without a second code the first one's gap is to 0.

  Args:
    codes: float [num_images, latent_dim].
    factors: int [num_images, num_factors].
  """
  information = mutual_information(codes, factors)
  scored = varying(factors)
  gaps = np.full(len(scored), np.nan)
  for factor in np.flatnonzero(scored):
    shares = np.bincount(factors[:, factor]) / len(factors)
    entropy = -np.sum(shares * _log(shares))
    gaps[factor] = _gap(information[:, factor]) / entropy
  return gaps


def mutual_information(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
  """I(z_j; v_k) of binned codes, nats, [latent_dim, num_factors].

  The 20 bins of equal width over each code's range are those of published
  figures (Locatello et al. 2019). Few images bias it upwards: where code and
  factor are independent, by about (bins - 1)(classes - 1) / (2 num_images)
  nats (Miller 1955), so compare only what was measured on as many images.

  Args:
    codes: float [num_images, latent_dim].
    factors: int [num_images, num_factors].
  """
  num_classes = factors.max() + 1
  information = np.empty((codes.shape[1], factors.shape[1]))
  for j, code in enumerate(codes.T):
    edges = np.histogram_bin_edges(code, NUM_BINS)
    # The last bin includes its upper edge, so that none is beyond it.
    bins = np.digitize(code, edges[:-1]) - 1
    for k, factor in enumerate(factors.T):
      # scikit-learn would count the pairs too, in many times the time.
      cells = np.bincount(
        bins * num_classes + factor, minlength=NUM_BINS * num_classes
      )
      information[j, k] = mutual_info_score(
        None, None, contingency=cells.reshape(NUM_BINS, num_classes)
      )
  return information


def dci(
  codes_train: np.ndarray,
  factors_train: np.ndarray,
  codes_test: np.ndarray,
  factors_test: np.ndarray,
  seed: int = 0,
) -> DCI:
  """Disentanglement, completeness, informativeness; Eastwood & Williams 2018.

  A code's importance for a factor is the share of impurity that its splits
  remove in a random forest that tells the factor's class, as in the paper,
  section 4.3. There the depth is tuned on validation images; here it is
  fixed, and leaves are large, because codes that tell nothing earn some
  importance by overfitting. They still earn a little, so that a random code
  is close to 0 and not at it.
  """

  def read(factor):
    # Every split sees every code: among few, drawn at random, it often has to
    # take one that tells nothing, and importance spreads.
    forest = RandomForestClassifier(
      n_estimators=10,
      max_depth=6,
      min_samples_leaf=10,
      max_features=None,
      random_state=seed,
    ).fit(codes_train, factors_train[:, factor])
    accuracy = np.mean(forest.predict(codes_test) == factors_test[:, factor])
    return forest.feature_importances_, accuracy

  scored = varying(factors_train, factors_test)
  importances = np.full((codes_train.shape[1], len(scored)), np.nan)
  accuracy = np.full(len(scored), np.nan)
  columns = np.flatnonzero(scored)
  for factor, values in zip(columns, _in_threads(read, columns), strict=True):
    importances[:, factor], accuracy[factor] = values
  return DCI(
    disentanglement=disentanglement(importances[:, scored]),
    completeness=completeness(importances[:, scored]),
    informativeness=mean(accuracy),
    importances=importances,
    accuracy=accuracy,
  )


def disentanglement(importances: np.ndarray) -> float:
  """Σ_i ρ_i (1 - H_K(P_i)); Eastwood & Williams 2018, section 2.

  P_i are the shares of the K factors in code i's importance, H_K is their
  entropy to base K, ρ_i is the code's share in all importance: a dead code
  weighs nothing. 0 where no code is of use, NaN without two factors to be
  told apart.

  Args:
    importances: [latent_dim, num_factors], not negative.
  """
  if importances.shape[1] < 2:
    return np.nan
  weights = importances.sum(axis=1)
  weights = weights / (weights.sum() or 1.0)
  return float(np.sum(weights * _concentration(importances)))


def completeness(importances: np.ndarray) -> float:
  """Mean over factors of 1 - H_D(P_j); Eastwood & Williams 2018, section 2.

  P_j are the shares of the D codes in factor j's importance, H_D is their
  entropy to base D. A factor for which no code is of use counts as 0; NaN
  without factors.

  Args:
    importances: [latent_dim, num_factors], not negative.
  """
  return mean(_concentration(importances.T))


def sap(
  codes_train: np.ndarray,
  factors_train: np.ndarray,
  codes_test: np.ndarray,
  factors_test: np.ndarray,
) -> np.ndarray:
  """SAP of each factor, [num_factors]; the SAP score is their mean.

  The gap between the two codes from which alone the factor is best told;
  Kumar et al. 2018, section 3. Their score of a code for a categorical factor
  is the balanced accuracy of thresholds on it. Here a decision tree sets
  them, one fewer than there are classes, on the training images. `sap_svm`
  has the recipe of published figures.

  A perfect code of a binary factor has 1 - ½: what tells nothing is still
  right at chance. Dead codes, and the second one where there is but one, have
  0 as in the paper, so that a single live code has its whole accuracy.
  """
  train, test, alive = _standardize(codes_train, codes_test)

  def score(code, labels, held_out):
    if not alive[code]:
      return 0.0
    classifier = DecisionTreeClassifier(
      max_leaf_nodes=int(labels.max()) + 1,
      class_weight='balanced',
      random_state=0,
    )
    classifier.fit(train[:, [code]], labels)
    return balanced_accuracy(held_out, classifier.predict(test[:, [code]]))

  return _gaps(score, len(alive), factors_train, factors_test)


def sap_svm(
  codes_train: np.ndarray,
  factors_train: np.ndarray,
  codes_test: np.ndarray,
  factors_test: np.ndarray,
) -> np.ndarray:
  """SAP as published figures have it, [num_factors]; Locatello et al. 2019.

  A code's score is the plain accuracy of a linear SVM with C = 0.01 and
  balanced class weights on the code as it is. A line cannot cut out the inner
  values of a factor that has many, and plain accuracy rewards naming the
  frequent class of a rare attribute; `sap` has neither fault.
  """
  train, test = (np.asarray(c, np.float64) for c in (codes_train, codes_test))

  def score(code, labels, held_out):
    classifier = LinearSVC(C=0.01, class_weight='balanced', dual=False)
    classifier.fit(train[:, [code]], labels)
    return np.mean(classifier.predict(test[:, [code]]) == held_out)

  return _gaps(score, train.shape[1], factors_train, factors_test)


def _gaps(score, num_codes, factors_train, factors_test):
  """Best less second-best score of a code for each factor, NaN if unscored."""

  def gap(factor):
    labels, held_out = factors_train[:, factor], factors_test[:, factor]
    return _gap([score(code, labels, held_out) for code in range(num_codes)])

  scored = varying(factors_train, factors_test)
  gaps = np.full(len(scored), np.nan)
  gaps[scored] = _in_threads(gap, np.flatnonzero(scored))
  return gaps


def balanced_accuracy(labels: np.ndarray, named: np.ndarray) -> float:
  """Mean over the classes in `labels` of the share that was named rightly."""
  counts = np.bincount(labels)
  right = np.bincount(labels, weights=named == labels)
  return float(np.mean(right[counts > 0] / counts[counts > 0]))


def _standardize(train, test):
  """Both in units of the training codes' deviation, and which are alive."""
  train, test = np.asarray(train, np.float64), np.asarray(test, np.float64)
  alive = train.var(axis=0) > _DEAD_VARIANCE
  scale = np.where(alive, train.std(axis=0), 1.0)
  center = train.mean(axis=0)
  return (train - center) / scale, (test - center) / scale, alive


def _gap(scores):
  """The best score less the second best, or less 0 where it is alone."""
  second, best = np.sort(np.append(scores, 0.0))[-2:]
  return best - second


def _log(shares):
  """The logarithm, with 0 for 0: such a share adds nothing to an entropy."""
  return np.log(np.where(shares > 0, shares, 1.0))


def _concentration(weights):
  """1 - entropy of each row's shares, to base of their number; 0 for no row.

  The entropy of a single share is 0 to any base.
  """
  totals = weights.sum(axis=1, keepdims=True)
  shares = weights / np.where(totals > 0, totals, 1.0)
  entropies = -np.sum(shares * _log(shares), axis=1)
  concentrations = 1 - entropies / np.log(max(weights.shape[1], 2))
  return np.where(totals[:, 0] > 0, concentrations, 0.0)


def _in_threads(function: Callable, arguments: Iterable) -> list:
  """`function` of each argument, in order, on all cores.

  Threads, because a process that runs JAX must not be forked; scikit-learn
  lets go of the interpreter while it fits.
  """
  run = Parallel(n_jobs=-1, prefer='threads')
  return run(delayed(function)(argument) for argument in arguments)
