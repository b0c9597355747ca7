"""The nodes of the pipeline, one file each, run as `python -m tessera.running NAME`."""
