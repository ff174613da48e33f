"""The benchmark suite of amtl_kernels: paired, interleaved comparisons that check before they time.

``python -m bench run`` measures, ``compare`` finds regressions between two result files,
``table`` and ``plot`` show one. What the GPU suite shares (statistics, the interleaving runner,
the machine description, tables and the result format) imports no CUDA and assumes no CPU.
"""
