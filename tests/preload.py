"""A fork server imports this file after the modules that its runs use. The runs then have the
vocabulary, the compiled scripts and, if matplotlib is among the modules, the fonts."""
import gc
import io
import os
import sys
import tempfile

import common
import tiktoken

# tiktoken keeps the encoding; the tests of how it is loaded clear its cache
with tempfile.TemporaryDirectory() as folder:
    common.copy_vocabulary(folder)
    os.environ["TIKTOKEN_CACHE_DIR"] = folder
    tiktoken.get_encoding("gpt2")
    del os.environ["TIKTOKEN_CACHE_DIR"]

for script in common.TRAIN, common.PREPARE:
    common.compile_script(str(script))

if "matplotlib" in sys.modules:
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams["savefig.dpi"] = 10  # a picture takes 0.06 s, not 0.12 s
    Figure().subplots().figure.savefig(io.BytesIO())  # loads the fonts

gc.collect()
gc.freeze()  # a garbage collection in a run does not go through all this
