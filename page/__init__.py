"""The page of app.py, in a browser by way of Gradio, which only this folder imports.

`controls` are what a visitor chooses, `experts` is the part that shows which expert took which
patch, and `tabs` are what can be done: draw, look at a picture of one's own, compare two drawings.
What they show is computed in `sampling` and `routing`, which know no page.
"""
