"""An unmodified script on this machine's best terms: what ``hotloop run`` does.

Outside, before the script:
    changes   what is changed and why, decided from the machine
    command   the script's interpreter and environment, by exec
    compare   with and without, in turn
Inside the script's process:
    startup/  the sitecustomize that Python imports first
    inside    before torch, after torch
    matmul    products by the fastest kernel
    optimizer Adam by the fused kernel
    updates   other rules by hotloop's kernel, where a choice says that it is faster
    operators convolutions and poolings, where a choice says that hotloop's are faster
              (operator_kernel: how one is taken over)
    loaders   batches at once of recognised data sets (datasets) and straight ones (straight)
              (row_index: what can be looked up)
    waits     time spent in DataLoaders
    session   counters; report and suggest at the end

Nothing is imported here: the script's process takes ``settings`` and ``inside`` alone.
"""
