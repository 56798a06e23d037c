"""What simulated roundings make of numbers, as JSON: of each draw the numbers, sums with small ones, and cotangents.

python tests/jaxtrain/stored_roundings.py CASES.json OUT.json      CASES: {numbers: [...], small: [...], unit: 2^-8, draws: 4}
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.rounding import Draw, rounded, simulate
from trainspec.step import RMS_ROUNDING, Roundings


def main() -> None:
    """Read CASES and write OUT."""
    jax.config.update("jax_enable_x64", True)
    cases, out = map(Path, sys.argv[1:])
    asked = json.loads(cases.read_text())
    numbers, small = (jnp.asarray(asked[name]) for name in ("numbers", "small"))
    sizes = Roundings(RMS_ROUNDING * asked["unit"], RMS_ROUNDING * 2.0**-24, RMS_ROUNDING * 2.0**-24)

    @jax.jit
    def made(draw: Draw) -> dict[str, jax.Array]:
        with simulate(sizes, draw):
            stored = rounded(numbers)
            summed = rounded(stored + small)
            # The cotangent of the numbers is the numbers themselves.
            cotangent = jax.grad(lambda x: jnp.sum(rounded(x) * numbers))(small)
        return {"stored": stored, "summed": summed, "cotangent": cotangent}

    found = [made(Draw.numbered(number, 7 + number)) for number in range(asked["draws"])]
    out.write_text(
        json.dumps([{name: np.asarray(array).tolist() for name, array in each.items()} for each in found])
    )


if __name__ == "__main__":
    main()
