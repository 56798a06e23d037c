"""How far simulated roundings move sums, as JSON: root mean squares in units of the sum of squares of the terms.

python tests/jaxtrain/rounded_sums.py CASES.json OUT.json      CASES: {name: [sums, terms] of numbers}
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.rounding import Draw, Sums, in_sums, simulate
from trainspec.step import Roundings


def moved(terms: np.ndarray, sizes: Roundings, sums: Sums, of_total: Sums) -> float:
    """The root mean square of the sums' movement."""
    with simulate(sizes, Draw.numbered(0, 7)):
        result = in_sums(jnp.sum(in_sums(jnp.asarray(terms), sums), axis=1), of_total)
    return float(np.sqrt(np.mean(np.square(np.asarray(result) - terms.sum(axis=1)))))


def main() -> None:
    """Read CASES and write OUT."""
    jax.config.update("jax_enable_x64", True)
    cases, out = map(Path, sys.argv[1:])
    found, sizes = {}, Roundings(*(3 * [0.4247 * 2.0**-24]))
    for name, numbers in json.loads(cases.read_text()).items():
        terms = np.array(numbers)
        n = terms.shape[1]
        found[name] = {
            "whole": moved(terms, sizes, Sums(factor=n), Sums(total=n)),
            "terms alone": moved(terms, sizes, Sums(factor=3 * n), Sums()),
        }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
