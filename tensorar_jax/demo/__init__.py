"""A page in the browser to try trained stages: `--mode=demo`.

`service` turns requests into pictures, `page` shows them with gradio.
"""
