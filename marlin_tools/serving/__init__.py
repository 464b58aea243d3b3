"""Our kernels inside other people's engines: vLLM (a plugin that it finds by itself) and transformers (a quantizer).

Nothing here is imported by the rest of the package except to ask what an engine sees; the engines are imported by what serves
them, never by this module.
"""
