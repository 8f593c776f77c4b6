"""TEMI as a scikit-learn estimator, for arrays of any features."""

import copy
import dataclasses
import re
from typing import Any

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from temi.config import TrainConfig
from temi.metrics import neighbor_information
from temi.neighbors import nearest_neighbors
from temi.runs import Run
from temi.training import train
from temi.trouble import DivergenceError


class TEMI(ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin, BaseEstimator):
    """Cluster the rows of an array with an ensemble of heads trained by TEMI.

    The same training as :func:`temi.train`, with scikit-learn's interface: it clones, pickles,
    stands in a pipeline and in a grid search. Where the data are few, neighbours and batch are cut
    to them; a cluster that no row is in is left out of the numbering.

    Parameters
    ----------
    n_clusters : int
        From 1 to the number of rows. With 1 nothing is trained.
    recipe : {"fast", "best", "paper"}
        Source of every setting below that is None; see :class:`temi.TrainConfig`, which states
        ranges and reasons.
    n_heads : int, optional
    beta : float, optional
    n_neighbors : int, optional
    batch_size : int, optional
    learning_rate : float, optional
    epochs : int, optional
    normalize : {"none", "l2", "center-l2"}, optional
    random_state : int, RandomState or None
        Of initial weights, order and pairs; an int gives the same clusters each time.
    device : str
        Where it trains. Predictions are made on the CPU, in float64.
    verbose : bool
        Show a progress bar.

    Attributes
    ----------
    labels_ : ndarray [N], int64
        Cluster of each row trained on, by vote of the heads; numbered from 0 without gaps.
    n_clusters_ : int
        Clusters that have rows, ``n_clusters`` or fewer.
    agreement_ : ndarray [N], float64
        Share of heads that voted with the winner.
    n_neighbors_, batch_size_ : int
        As they were used; 0 with one cluster.
    run_ : Run, or None with one cluster
        With its teacher in float64.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Where the columns have names.

    Raises
    ------
    ValueError
        From ``fit``: if a setting is not allowed, there are fewer rows than clusters, or a row is
        not finite. The message names it and what is allowed.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> import temi
    >>> x = load_digits().data
    >>> temi.TEMI(n_clusters=10, n_heads=2, epochs=1, random_state=0).fit_predict(x).shape
    (1797,)
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        recipe="fast",
        n_heads=None,
        beta=None,
        n_neighbors=None,
        batch_size=None,
        learning_rate=None,
        epochs=None,
        normalize=None,
        random_state=None,
        device="auto",
        verbose=False,
    ):
        self.n_clusters = n_clusters
        self.recipe = recipe
        self.n_heads = n_heads
        self.beta = beta
        self.n_neighbors = n_neighbors
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.normalize = normalize
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X, y=None):
        """Train on rows.

        Parameters
        ----------
        X : array-like [N, D]
            N at least 2; converted to float64. The heads see float32: subtract an offset that is
            millions of times the spread.
        y : ignored

        Returns
        -------
        TEMI
            Itself.

        Raises
        ------
        ValueError
            If rows or settings do not fit, as scikit-learn or :class:`temi.TrainConfig` says; or
            the heads collapse, as there are more clusters than different rows.
        DivergenceError
            If they collapse otherwise: a lower ``learning_rate`` helps.
        """
        x = _with_directions(validate_data(self, X, dtype=np.float64, ensure_min_samples=2))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if not isinstance(self.n_clusters, (int, np.integer)) or not (
            1 <= self.n_clusters <= len(x)
        ):
            raise ValueError(
                f"n_clusters={self.n_clusters!r}: a whole number from 1 to n_samples={len(x)} is "
                "allowed"
            )
        config = self._config(len(x), seed)
        if self.n_clusters == 1:
            self.run_, self.n_neighbors_, self.batch_size_ = None, 0, 0
            self.agreement_, labels = np.ones(len(x)), np.zeros(len(x), dtype=np.int64)
        else:
            run = self._train(x, config)
            teacher = copy.deepcopy(run.teacher).double().cpu()
            self.run_ = dataclasses.replace(run, teacher=teacher)
            self.n_neighbors_ = run.config.num_neighbors
            self.batch_size_ = int(run.config.batch_size)
            self.agreement_, labels = run.agreement, self.run_.predict(x)
        self._kept = np.unique(labels)  # clusters of the run, by number here
        self.n_clusters_ = self._n_features_out = len(self._kept)
        self.labels_ = np.searchsorted(self._kept, labels)
        return self

    def _train(self, x: np.ndarray, config: TrainConfig) -> Run:
        try:
            return train(x, config, progress=self.verbose)
        except DivergenceError as error:
            different = len(np.unique(x, axis=0))
            if different >= config.num_clusters:
                raise
            raise ValueError(
                f"n_clusters={self.n_clusters}: up to {different} is allowed, as X has no more "
                "different rows"
            ) from error

    def _config(self, num_rows: int, seed: int) -> TrainConfig:
        try:
            config = TrainConfig(
                num_clusters=max(2, int(self.n_clusters)), recipe=self.recipe,
                num_heads=self.n_heads, beta=self.beta, num_neighbors=self.n_neighbors,
                batch_size=self.batch_size, learning_rate=self.learning_rate, epochs=self.epochs,
                normalize=self.normalize, seed=seed, device=self.device,
            )  # fmt: skip
        except ValueError as error:  # in the names that scikit-learn has
            raise ValueError(re.sub(r"^num_(?=heads|neighbors)", "n_", str(error))) from None
        cut: dict[str, Any] = {}
        if config.batch_size != "auto":
            cut["batch_size"] = min(config.batch_size, num_rows)
        if config.num_neighbors is not None:
            cut["num_neighbors"] = min(config.num_neighbors, num_rows - 1)
        return dataclasses.replace(config, **cut)

    def predict(self, X):
        """Cluster of each row by vote of the heads, as in ``labels_``.

        A row that the heads put into a cluster without rows goes to the most probable of those
        that have some.

        Parameters
        ----------
        X : array-like [N, D]

        Returns
        -------
        ndarray [N], int64
        """
        x = self._rows(X)
        if self.run_ is None:
            return np.zeros(len(x), dtype=np.int64)
        clusters = self.run_.predict(x)
        labels = np.searchsorted(self._kept, clusters)
        if (empty := ~np.isin(clusters, self._kept)).any():
            labels[empty] = self._probs(x[empty]).argmax(axis=1)
        return labels

    def predict_proba(self, X):
        """Probability of each cluster: the mean over heads.

        Parameters
        ----------
        X : array-like [N, D]

        Returns
        -------
        ndarray [N, n_clusters_], float64
        """
        return self._probs(self._rows(X))

    def transform(self, X):
        """The same as :meth:`predict_proba`: each row as its probabilities of the clusters."""
        return self.predict_proba(X)

    def score(self, X, y=None):
        """How much a row's cluster says about its neighbours' clusters, in nats; ``y`` is not read.

        :func:`temi.neighbor_information` of the probabilities of ``X``, over its ten
        nearest neighbours within ``X``. Higher is better; at most log K, so that it compares
        settings of one number of clusters. 0 for a single row.

        Parameters
        ----------
        X : array-like [N, D]
        y : ignored

        Returns
        -------
        float
        """
        x = self._rows(X)
        if len(x) == 1 or self.run_ is None:
            return 0.0
        neighbors, _ = nearest_neighbors(self.run_.inputs(x), min(10, len(x) - 1))
        return neighbor_information(self._probs(x), neighbors.numpy())

    def _rows(self, X) -> np.ndarray:
        check_is_fitted(self)
        return _with_directions(validate_data(self, X, dtype=np.float64, reset=False))

    def _probs(self, x: np.ndarray) -> np.ndarray:
        if self.run_ is None:
            return np.ones((len(x), 1))
        probs = self.run_.predict_proba(x)[:, self._kept]
        return probs / probs.sum(axis=1, keepdims=True)


def _with_directions(x: np.ndarray) -> np.ndarray:
    """``x`` with next to nothing in place of rows of zeros.

    They are places like any other here, while :func:`temi.train` takes them for blank images.
    """
    return np.where(x.any(axis=1, keepdims=True), x, 1e-15)
