// What a tensor is and where it lies, by one call of the C interface that torch's tensors offer since torch 2.10 (the
// exchange API of DLPack 1): 20 ns, where a tensor's own methods take 60 for each question, and without torch's headers.
#pragma once
#include <stdexcept>

#include "../bind.h"
#include "dlpack.h"

namespace sparsekern {

// Looks at a torch.Tensor or Parameter; false, with a Python error, where it has no memory to look at.
inline bool view(PyObject* tensor, TensorView& to) {
    const TensorExchange* const exchange = made_once([] {
        const py::object offered = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
        const auto* found = static_cast<TensorExchange*>(PyCapsule_GetPointer(offered.ptr(), "dlpack_exchange_api"));
        if (!found) throw py::error_already_set();
        while (found && found->major != 1) found = found->earlier;
        if (!found || !found->view) throw std::runtime_error("torch offers no exchange API of DLPack 1 for its tensors");
        return found;
    });
    return !exchange->view(tensor, &to);
}
inline TensorView view_of(PyObject* tensor) {
    TensorView found;
    if (!view(tensor, found)) throw py::error_already_set();
    return found;
}

}  // namespace sparsekern
