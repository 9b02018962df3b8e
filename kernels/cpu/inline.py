"""How helpers are compiled, the functions that are inlined into regions: as far as LLVM's IR. Left alone, Numba optimises each and makes
machine code of it, which nobody calls, and does so again for every helper that it is inlined into: half of the time that a region takes to
compile. A region is optimised whole, with all that is in it.

A compiler with a pass of one's own is how Numba lets itself be changed. A Numba without the classes that are derived of here says so when
this module is imported; one that ends a library otherwise than by `_finalize_final_module` makes the machine code as before.
"""

from typing import Any

from numba import _dynfunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering


class _Linked(JITCodeLibrary):
    """Code that is only ever linked into other code."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _LoweringToLink(NativeLowering):
    """Numba's last step, without its very end."""

    _name = "fastloss_lowering_to_link"

    def run_pass(self, state: Any) -> bool:
        state.library = library = _Linked(state.targetctx.codegen(), state.func_id.func_qualname)
        library.enable_object_caching()
        state.flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        described = lowered.fndesc
        # by this object Numba finds the code again for those who call it; it has no entry of its own, as before
        function = _dynfunc.make_function(described.lookup_module(), described.qualname, "", 0, lowered.env, (library,))
        state.targetctx.insert_user_function(function, described, [library])
        state["cr"] = lowered._replace(cfunc=function)
        return True


class _CompilerToLink(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        steps = DefaultPassBuilder.define_nopython_pipeline(self.state)
        steps.passes = [(_LoweringToLink if step is NativeLowering else step, why) for step, why in steps.passes]
        steps.finalize()
        return [steps]


# what is inlined needs no entry from Python or C: without those it compiles in three quarters of the time
INLINE: dict[str, Any] = {
    "forceinline": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": _CompilerToLink,
}
"""The options of every helper, for @njit and @overload."""
