"""What a finetuned classifier must beat: TF-IDF and logistic regression, tuned as far as seconds allow."""

from collections.abc import Sequence
from typing import Any

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
) -> dict[str, Any]:
    """Fit on train, choose features and C by validation accuracy, and only then look at the test, once.

    Features are `words` (single words and pairs) or `characters` (2 to 5 inside words), with sublinear counts and
    inverse document frequencies from the training texts alone. C is the inverse strength of the L2 penalty. Of equal
    validation accuracies the earlier features and then the smaller C win. Nothing is random.

    Returns:
        features, c, num_features, valid_accuracy, valid_macro_f1, test_accuracy, test_macro_f1,
        valid_by_choice: {"words C=1": accuracy, …}, test_predictions: list [N]. All of it goes into JSON.

    Raises:
        ConfigError: scikit-learn is missing, unknown features, or a C that is not positive.
        DataError: an empty split, texts and labels of different numbers, or fewer than two training classes.
    """
    valid, test = (valid_texts, valid_labels), (test_texts, test_labels)
    _check({"train": (train_texts, train_labels), "valid": valid, "test": test}, grid, features)
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ConfigError('the TF-IDF baseline needs scikit-learn; install "fm_jax[quickstart]"') from error

    choices: dict[str, tuple[float, Any, Any, str, float]] = {}
    for name in features:
        vectorizer = TfidfVectorizer(sublinear_tf=True, **FEATURES[name])
        try:
            inputs = vectorizer.fit_transform(train_texts)
        except ValueError as error:  # an empty vocabulary
            raise DataError(f"the training texts hold no {name} to count: {error}") from error
        held_out = vectorizer.transform(valid_texts)
        for c in sorted(grid):
            model = LogisticRegression(C=c, max_iter=2000).fit(inputs, train_labels)
            score = accuracy(valid_labels, model.predict(held_out))
            choices[f"{name} C={c:g}"] = score, vectorizer, model, name, c
    score, vectorizer, model, name, c = max(choices.values(), key=lambda choice: choice[0])  # the first of equals
    predictions = model.predict(vectorizer.transform(test_texts))
    return {
        "features": name,
        "c": float(c),
        "num_features": len(vectorizer.vocabulary_),
        "valid_accuracy": score,
        "valid_macro_f1": macro_f1(valid_labels, model.predict(vectorizer.transform(valid_texts))),
        "test_accuracy": accuracy(test_labels, predictions),
        "test_macro_f1": macro_f1(test_labels, predictions),
        "valid_by_choice": {key: choice[0] for key, choice in choices.items()},
        "test_predictions": predictions.tolist(),
    }


def _check(splits: dict[str, tuple[Sequence[str], Sequence[int]]], grid: Sequence[float], features: Any) -> None:
    for name, (texts, labels) in splits.items():
        if not len(texts) or len(texts) != len(labels):
            raise DataError(f"{name} has {len(texts)} texts and {len(labels)} labels; give as many of each, above 0")
    classes = set(splits["train"][1])
    if len(classes) < 2:
        raise DataError(f"all training labels are {classes.pop()!r}; a classifier needs two classes")
    if not len(grid) or min(grid) <= 0:
        raise ConfigError(f"the grid of C must hold positive numbers, not {list(grid)}")
    if not features or (unknown := set(features) - FEATURES.keys()):
        named = ", ".join(sorted(unknown)) if features else "none"
        raise ConfigError(f"features must be among {', '.join(FEATURES)}, not {named}")
