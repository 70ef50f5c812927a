"""Every test sees eight host devices, and an error where arrays of different rank would broadcast."""

import os
import tempfile

# Nearly all of the time goes to compilation. Said before JAX starts; processes that tests start hear it too.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if "PYTEST_XDIST_WORKER" not in os.environ:  # what one test compiled, the next need not, whichever worker runs it
    CACHE = tempfile.TemporaryDirectory(prefix="rl_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name

import jax

jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
