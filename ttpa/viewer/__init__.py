"""What `python -m ttpa.view` makes its page of: records of trees, and the page that shows them."""
