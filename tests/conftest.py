"""Every test sees eight host devices, and an error where arrays of different rank would broadcast."""

import os
import tempfile

import jax

CACHE = tempfile.TemporaryDirectory(prefix="rl_jax_tests_")  # what one test compiled, the next need not

os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name  # for the processes that tests start
jax.config.update("jax_compilation_cache_dir", CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
