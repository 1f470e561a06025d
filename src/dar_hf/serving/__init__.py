"""A server with OpenAI's images API, on Ray Serve (docs/serving.md).

``requests`` checks what is asked for, ``batches`` draws requests together, ``api`` is HTTP, ``server`` the application
of Ray Serve, and ``command`` is ``dar-hf serve``. Only ``server`` and ``command`` need Ray.
"""
