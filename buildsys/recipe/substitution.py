        raise RecipeError(
            match = TOKEN.match(text, at)
