"""Label maps are cleaned by what medicine knows: ``components`` holds the rules, ``steps`` what a method chains."""
