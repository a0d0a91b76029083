"""The page of app.py, in a browser by way of Gradio, which only this folder imports.

`experts` is the part that shows which expert took which patch; `tabs` are what a visitor can do:
draw, look at a picture of their own, compare two drawings. What they show is computed in `sampling`
and `routing`, which know no page.
"""
