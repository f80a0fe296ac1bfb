"""Labels in the code: linear probe, MIG, DCI, SAP.

A code is the posterior means of images, a factor what is known of them: a
generating factor, or an attribute. A factor with a single value in either part
cannot be scored: it is NaN, and left out of every mean.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.stats import entropy
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.parallel import delayed, Parallel
from threadpoolctl import threadpool_limits

from evaluation.measure import MAX_FITTED, mean_and_error, Null
from vae import splits

NUM_BINS = 20

# A code that varies no more than this is dead; as in Locatello et al. 2019.
_DEAD_VARIANCE = 1e-12

# As 40 attributes of CelebA take minutes each time.
_PERMUTATIONS = 3

_NOT_COMPARABLE = 'not comparable with published figures'
ABOUT = {
  'linear_accuracy': 'logistic regression on the means, {images}; ± is over '
  'the tested images; null, here and below: permuted labels',
  'majority_accuracy': 'of always naming the most frequent class',
  'mig': 'mutual information gap (Chen et al. 2018), 20 bins, of {fitted}',
  'dci_disentanglement': 'Eastwood & Williams 2018, random forest; '
  f'{_NOT_COMPARABLE}, which have gradient boosting',
  'dci_completeness': f'the same; {_NOT_COMPARABLE}',
  'dci_informativeness': "the same; the forest's held-out accuracy; "
  f'{_NOT_COMPARABLE}',
  'sap': 'separated attribute predictability (Kumar et al. 2018), thresholds '
  f'and balanced accuracy; {_NOT_COMPARABLE}: those are sap_svm',
  'sap_svm': 'the same by a linear SVM and plain accuracy, as in published '
  'figures (Locatello et al. 2019)',
}

# In the table of each label: accuracies, and scores beside their nulls.
_ACCURACIES = ('linear_accuracy', 'majority_accuracy')
_SCORES = ('mig', 'sap', 'sap_svm')


class Data(NamedTuple):
  """Codes to fit to, codes to score on, and the factors of each.

  Codes are [num_images, latent_dim], factors class indices from 0, int
  [num_images, num_factors].
  """

  codes: np.ndarray
  factors: np.ndarray
  test_codes: np.ndarray
  test_factors: np.ndarray

  def permuted(self, seed) -> 'Data':
    """Factors in a random order: independent of codes, not of each other."""
    shuffle = np.random.default_rng(seed).permutation
    return self._replace(
      factors=shuffle(self.factors), test_factors=shuffle(self.test_factors)
    )


def check(context) -> str | None:
  """Reads the labels before any long work: their file may be wrong."""
  for name in (context.split_name, context.fitted_name):
    if getattr(context.data, name).labels() is None:
      return f'the {name} split has no labels; leave labels out.'
  return None


def evaluate(context, results) -> None:
  """Adds scores of the labels in the codes, and of permuted labels."""
  labels, seed = context.split.labels(), context.settings.seed
  tested = splits.spread(context.split.num_examples, MAX_FITTED)
  fitted_labels = getattr(context.data, context.fitted_name).labels()
  data = Data(
    context.fitted['mean'],
    fitted_labels.values[context.fitted['positions']],
    context.images['mean'][tested],
    labels.values[tested],
  )
  print(f'reading {len(labels.names)} labels from the codes …', flush=True)
  means, by_label, errors = score(data, seed)
  nulls = []
  for i in range(_PERMUTATIONS):
    print(f'reading permuted labels, {i + 1} of {_PERMUTATIONS} …', flush=True)
    nulls.append(score(data.permuted([seed, i]), seed))

  fitted = f'{len(data.codes):,} {context.fitted_name} images'
  images = f'fitted to {fitted}, {len(data.test_codes):,} tested'
  for name, about in ABOUT.items():
    null = None
    if name != 'majority_accuracy':  # Permuted labels have the same one.
      null = Null.of([null_means[name] for null_means, _, _ in nulls])
    about = about.format(images=images, fitted=fitted)
    results.number(
      name, means[name], 'at most 1', about, errors.get(name), null
    )
  columns = {name: by_label[name] for name in _ACCURACIES}
  for name in _SCORES:
    columns[name] = by_label[name]
    columns[f'{name}_null'] = np.mean([n[1][name] for n in nulls], axis=0)
  results.labels = {
    label: {name: float(column[i]) for name, column in columns.items()}
    for i, label in enumerate(labels.names)
  }


def score(
  data: Data, seed: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, float]]:
  """Every score of this module; `seed` is the forest's.

  Returns:
    Means over factors, by name; scores of each factor, [num_factors]; standard
    errors of the accuracies (an image's factors are not independent).
  """
  ranges = [np.ptp(f, axis=0) for f in (data.factors, data.test_factors)]
  scored = np.flatnonzero(np.min(ranges, axis=0))
  # In threads: a process that runs JAX must not be forked, and scikit-learn
  # lets go of the interpreter while it fits. Threads of BLAS beside them only
  # wait for each other: fits take forty times as long.
  run = Parallel(n_jobs=-1, prefer='threads')
  with threadpool_limits(1):
    found = run(delayed(_score_factor)(data, factor, seed) for factor in scored)
  by_factor = {'mig': mutual_information_gap(data.codes, data.factors)}
  for name in (*_ACCURACIES, 'dci_informativeness', 'sap', 'sap_svm'):
    by_factor[name] = np.full(len(ranges[0]), np.nan)
    by_factor[name][scored] = [np.mean(scores[name]) for scores in found]
  means = {name: _mean(values) for name, values in by_factor.items()}
  importances = np.reshape(
    [scores['importances'] for scores in found], (-1, data.codes.shape[1])
  ).T
  means['dci_disentanglement'] = disentanglement(importances)
  means['dci_completeness'] = completeness(importances)
  errors = {}
  for name in _ACCURACIES if found else ():
    by_image = np.mean([scores[name] for scores in found], axis=0)
    errors[name] = mean_and_error(by_image)[1]
  return means, by_factor, errors


def _mean(values: np.ndarray) -> float:
  values = values[~np.isnan(values)]
  return float(values.mean()) if len(values) else np.nan


def _score_factor(data: Data, factor: int, seed: int) -> dict[str, np.ndarray]:
  """Scores of a factor; accuracies of the probe are of each test image."""
  labels, held_out = data.factors[:, factor], data.test_factors[:, factor]
  codes, test = (a.astype(np.float64) for a in (data.codes, data.test_codes))
  alive = codes.var(axis=0) > _DEAD_VARIANCE
  scale = np.where(alive, codes.std(axis=0), 1.0)
  scaled, scaled_test = (
    (a - codes.mean(axis=0)) / scale for a in (codes, test)
  )

  probe = LogisticRegression(max_iter=1000).fit(scaled, labels)
  # Every split sees every code: among few, drawn at random, it often has to
  # take one without information, and importance spreads. Depth is fixed, and
  # leaves are large, as codes without information earn some by overfitting.
  forest = RandomForestClassifier(
    10, max_depth=6, min_samples_leaf=10, max_features=None, random_state=seed
  ).fit(data.codes, labels)

  def by_thresholds(code):
    """Balanced accuracy of one threshold fewer than there are classes."""
    if not alive[code]:
      return 0.0
    tree = DecisionTreeClassifier(
      max_leaf_nodes=int(labels.max()) + 1,
      class_weight='balanced',
      random_state=0,
    ).fit(scaled[:, [code]], labels)
    right = tree.predict(scaled_test[:, [code]]) == held_out
    return np.mean([right[held_out == c].mean() for c in np.unique(held_out)])

  def by_svm(code):
    """Plain accuracy, on the code as it is; Locatello et al. 2019."""
    svm = LinearSVC(C=0.01, class_weight='balanced', dual=False)
    svm.fit(codes[:, [code]], labels)
    return np.mean(svm.predict(test[:, [code]]) == held_out)

  each = range(codes.shape[1])
  return {
    'linear_accuracy': probe.predict(scaled_test) == held_out,
    'majority_accuracy': held_out == np.bincount(labels).argmax(),
    'importances': forest.feature_importances_,
    'dci_informativeness': forest.predict(data.test_codes) == held_out,
    'sap': _gap([by_thresholds(code) for code in each]),
    'sap_svm': _gap([by_svm(code) for code in each]),
  }


def mutual_information_gap(
  codes: np.ndarray, factors: np.ndarray
) -> np.ndarray:
  """(I(z_a; v) - I(z_b; v)) / H(v) of each factor v, [num_factors].

  a and b are the codes with the most and second most information on v; Chen et
  al. 2018, equation 6. Codes are in 20 bins of equal width over their range
  (Locatello et al. 2019). Few images bias the information upwards, by about
  (bins - 1)(classes - 1) / (2 num_images) nats (Miller 1955), so compare only
  what was measured on as many images.
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
  gaps = np.full(factors.shape[1], np.nan)
  for k in np.flatnonzero(np.ptp(factors, axis=0)):
    gaps[k] = _gap(information[:, k]) / entropy(np.bincount(factors[:, k]))
  return gaps


def disentanglement(importances: np.ndarray) -> float:
  """Σ_i ρ_i (1 - H_K(P_i)) of [latent_dim, num_factors].

  P_i are the K factors' shares in code i's importance, H_K is their entropy to
  base K, ρ_i is the code's share in all importance; Eastwood & Williams 2018,
  section 2. 0 if no code is of use, NaN without two factors.
  """
  if importances.shape[1] < 2:
    return np.nan
  weights = importances.sum(axis=1)
  weights = weights / (weights.sum() or 1.0)
  return float(np.sum(weights * _concentration(importances)))


def completeness(importances: np.ndarray) -> float:
  """Mean over factors of 1 - H_D(P_j) of [latent_dim, num_factors].

  P_j are the D codes' shares in factor j's importance; Eastwood & Williams
  2018, section 2. 0 of a factor for which no code is of use.
  """
  return _mean(_concentration(importances.T))


def _gap(scores: Iterable[float]) -> float:
  """The best score less the second best, or less 0 if it is alone."""
  second, best = np.sort(np.append(scores, 0.0))[-2:]
  return best - second


def _concentration(weights: np.ndarray) -> np.ndarray:
  """1 - entropy of each row's shares, to base of their number; 0 for no row."""
  totals = weights.sum(axis=1)
  # The entropy of a single share is 0 to any base.
  base = max(weights.shape[1], 2)
  rows = np.where(totals[:, None] > 0, weights, 1.0)
  return np.where(totals > 0, 1 - entropy(rows, base=base, axis=1), 0.0)
