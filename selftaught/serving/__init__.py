"""An OpenAI-compatible server for the models of this package: `selftaught serve`."""
