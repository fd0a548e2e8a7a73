"""For tests only: vLLM's own server, patched to load new weights on a CPU."""

import runpy

from patches import patch

if __name__ == "__main__":
    patch()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
