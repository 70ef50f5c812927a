"""Many runs at once: a run is one scan over its updates, and the runs are the rows of one compiled, mapped program.

    def run(setting, ref_params, prompts, prompt_mask):            # one run, from arrays to arrays
        optimizer = optax.adam(setting["learning_rate"])           # a traced rate, so inside
        sampling = dataclasses.replace(SAMPLING, temperature=setting["temperature"])
        state = init_state(ref_params, optimizer, setting["kl_coefficient"])

        def update(state, step):
            key = step_key(setting["seed"], Purpose.SAMPLE, step)
            ...
            return policy_gradient_update(state, rollout, rewards, optimizer=optimizer, ...)

        return jax.lax.scan(update, state, jnp.arange(200))

    settings = product_grid(seed=range(10), learning_rate=(1e-3, 3e-3), temperature=(0.7, 1.0), kl_coefficient=(0.05,))
    states, metrics = make_sweep(run, make_mesh())(settings, ref_params, prompts, prompt_mask)   # [40, ...] each

What changes the program (an estimator, a group size, a number of updates) is another `run`; what is a number is a
setting. Letters: R runs.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rl_jax.errors import InputError
from rl_jax.run.spmd import Mesh, pmapped, put
from rl_jax.types import PyTree


def product_grid(**values: Sequence[float]) -> dict[str, np.ndarray]:
    """Every combination of the values, along one axis; the last name varies fastest.

    Args:
        values: what each setting takes. Integers (seeds) stay integers.

    Returns:
        Arrays of R entries by name, int32 or float32.
    """
    rows = list(itertools.product(*values.values()))
    kinds = {name: np.int32 if all(isinstance(v, int) for v in tried) else np.float32 for name, tried in values.items()}
    return {name: np.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(kinds.items())}


def make_sweep(run_fn: Callable[..., PyTree], mesh: Mesh) -> Callable[..., PyTree]:
    """Compiles a run for many settings at once, vmapped over them, with the runs cut over the devices.

    A row of the result is what the run gives alone, to rounding, on any number of devices.

    Args:
        run_fn: the settings of one run, usually {name: []}, then any arguments that all runs share -> a pytree of
            arrays.
        mesh: from `make_mesh`. R need not be a multiple of its devices: the last run is repeated, and dropped.

    Returns:
        A function of settings, a pytree of arrays [R, ...], and the shared arguments -> what `run_fn` returns,
        [R, ...]. It raises InputError where the settings do not agree in R.
    """

    def run_all(settings: PyTree, shared: tuple[PyTree, ...]) -> PyTree:
        return jax.vmap(run_fn, in_axes=(0, *[None] * len(shared)))(settings, *shared)

    compiled = pmapped(run_all, mesh, (0, None), 0)

    def sweep(settings: PyTree, *shared: PyTree) -> PyTree:
        sizes = {np.shape(values)[:1] for values in jax.tree.leaves(settings)}
        if len(sizes) != 1 or sizes == {()}:
            raise InputError(f"Settings need a value for each run; the arrays given begin with {sorted(sizes)} runs.")
        ((runs,),) = sizes
        rows = np.minimum(np.arange(-(-runs // mesh.size) * mesh.size), runs - 1)
        padded = settings if len(rows) == runs else jax.tree.map(lambda x: x[rows], settings)
        return jax.tree.map(lambda x: x[:runs], compiled(put(padded, mesh, 0), put(shared, mesh)))

    vars(sweep).update(_cache_size=vars(compiled)["_cache_size"])
    return sweep
