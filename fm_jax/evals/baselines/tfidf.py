"""A baseline for finetuned text classifiers: TF-IDF and logistic regression, tuned on validation."""

from collections.abc import Sequence
from typing import Any, Literal

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.evals.metrics import accuracy, macro_f1

GRID = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
FEATURES = {
    "words": {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"},
    "characters": {"analyzer": "char_wb", "ngram_range": (2, 5)},
}


def tfidf_logistic(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    valid_texts: Sequence[str],
    valid_labels: Sequence[int],
    test_texts: Sequence[str],
    test_labels: Sequence[int],
    grid: Sequence[float] = GRID,
    features: Sequence[str] = tuple(FEATURES),
    criterion: Literal["accuracy", "macro_f1"] = "accuracy",
) -> dict[str, Any]:
    """Fit on train, choose features and C by validation accuracy or macro-F1, then evaluate once on test.

    Features are `words` (unigrams and bigrams) or `characters` (2- to 5-grams inside words), with sublinear counts and
    inverse document frequencies from the training texts alone. C is the inverse strength of the L2 penalty. On a tie
    the earlier features win, then the smaller C. The result is deterministic.

    Returns:
        features, c, num_features, valid_accuracy, valid_macro_f1, test_accuracy, test_macro_f1,
        valid_by_choice: {"words C=1": criterion's value, …}, test_predictions: list [N]. All values are JSON data.

    Raises:
        ConfigError: scikit-learn is missing, unknown features, or a C that is not positive.
        DataError: an empty split, different numbers of texts and labels, or fewer than two training classes.
    """
    valid, test = (valid_texts, valid_labels), (test_texts, test_labels)
    _check({"train": (train_texts, train_labels), "valid": valid, "test": test}, grid, features)
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ConfigError('the TF-IDF baseline needs scikit-learn; install "fm_jax[quickstart]"') from error

    measure = {"accuracy": accuracy, "macro_f1": macro_f1}[criterion]
    choices: dict[str, tuple[float, Any, Any, str, float]] = {}
    for name in features:
        vectorizer = TfidfVectorizer(sublinear_tf=True, **FEATURES[name])
        try:
            inputs = vectorizer.fit_transform(train_texts)
        except ValueError as error:  # an empty vocabulary
            raise DataError(f"the training texts contain no {name} to count: {error}") from error
        held_out = vectorizer.transform(valid_texts)
        for c in sorted(grid):
            model = LogisticRegression(C=c, max_iter=2000).fit(inputs, train_labels)
            score = measure(valid_labels, model.predict(held_out))
            choices[f"{name} C={c:g}"] = score, vectorizer, model, name, c
    _, vectorizer, model, name, c = max(choices.values(), key=lambda choice: choice[0])  # on a tie the first
    validated = model.predict(vectorizer.transform(valid_texts))
    predictions = model.predict(vectorizer.transform(test_texts))
    return {
        "features": name,
        "c": float(c),
        "num_features": len(vectorizer.vocabulary_),
        "valid_accuracy": accuracy(valid_labels, validated),
        "valid_macro_f1": macro_f1(valid_labels, validated),
        "test_accuracy": accuracy(test_labels, predictions),
        "test_macro_f1": macro_f1(test_labels, predictions),
        "valid_by_choice": {key: choice[0] for key, choice in choices.items()},
        "test_predictions": predictions.tolist(),
    }


def _check(splits: dict[str, tuple[Sequence[str], Sequence[int]]], grid: Sequence[float], features: Any) -> None:
    for name, (texts, labels) in splits.items():
        if not len(texts) or len(texts) != len(labels):
            raise DataError(
                f"{name} has {len(texts)} texts and {len(labels)} labels; give one label per text, at least 1"
            )
    classes = set(splits["train"][1])
    if len(classes) < 2:
        raise DataError(f"all training labels are {classes.pop()!r}; a classifier needs two classes")
    if not len(grid) or min(grid) <= 0:
        raise ConfigError(f"the grid of C must contain positive numbers, not {list(grid)}")
    if not features or (unknown := set(features) - FEATURES.keys()):
        named = ", ".join(sorted(unknown)) if features else "none"
        raise ConfigError(f"features must be among {', '.join(FEATURES)}, not {named}")
