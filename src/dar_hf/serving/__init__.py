"""A server with OpenAI's images API, on Ray Serve (docs/serving.md).

``requests`` checks requests, ``batches`` draws them together, ``api`` speaks HTTP, ``server`` is the application of
Ray Serve, and ``command`` is ``dar-hf serve``. Only ``server`` and ``command`` need Ray.
"""
