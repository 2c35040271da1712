"""A page in the browser to try trained stages.

`service` turns requests into pictures, `page` shows them with gradio.
"""
