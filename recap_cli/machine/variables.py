"""The environment variables that say how many threads compute, and how they wait. Reading them takes no torch."""

GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CORES_DIVIDED = "RECAP_CORES_DIVIDED"  # set with OMP_NUM_THREADS by `recap compare`, which divides the cores among its runs
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
