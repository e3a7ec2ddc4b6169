"""Every family against live transformers: outputs, every layer's output, the loss and its gradient.

Fresh weights alone would prove little: at initialisation the wrong GELU moves logits by 1e-5 and a lost bias by
nothing. So every case is also run with every tensor moved, and the families' wrong variants must be seen.
"""

import jax
import pytest

from fm_jax.hub import families
from tests.close import small
from tests.parity.all_families import FAMILY, MUTANTS
from tests.parity.comparison import changed, expected, measured, outputs

FRESH = [(case, False) for case, file in FAMILY.items() if getattr(file, "FRESH", True)]


@pytest.mark.parametrize(("case", "moved"), [*FRESH, *((case, True) for case in FAMILY)])
def test_ours_computes_what_theirs_does(case, moved):
    module, params, _ = expected(case, moved=moved)
    shapes = jax.tree.map(lambda leaf: leaf.shape, families.abstract(module))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    found = measured(case, moved=moved)
    print(case, {key: f"{value:.1e}" for key, value in found.items()})
    small(max(found.values()), FAMILY[case].TOLERANCE)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_variant_is_seen(mutant):
    case, change = MUTANTS[mutant]
    found, least = changed(case, change), 3 * FAMILY[case].TOLERANCE
    print(mutant, {key: f"{value:.1e}" for key, value in found.items()})
    assert max(outputs(found)) > least and found["gradients"] > least / 3, found
