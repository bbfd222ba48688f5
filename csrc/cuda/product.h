// A whole product for one geometry of operands: it looks whether they are what it was prepared for, makes the output
// and launches. One call from Python takes the place of checks, choice and launch in Python.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "../bind.h"
#include "launch.h"

namespace sparsekern {

// A launch with the names of its arguments: "tokens", "stream" and those of its tensors, in this order.
struct NamedLaunch {
    Launch launch;
    std::vector<std::string> words;
    std::vector<py::object> interned_words;
    py::object owner;  // unloads the function when it goes
};
using SharedLaunch = std::shared_ptr<const NamedLaunch>;

// What an operand must be: rows of so many features, with any stride or contiguous in any number of axes; a contiguous
// tensor of so many elements; a topology's tensor of so many bytes, which has a dtype of its own; or None.
struct Operand {
    enum Kind { ROWS, WHOLE, BYTES, NOTHING } kind;
    std::string name;
    int64_t size;
};

class Product {
public:
    Product(std::string name, py::object dtype, int device, std::vector<Operand> operands, int64_t features,
            py::tuple blocks, py::function current_device, py::function current_stream);

    // Launches for 2^bucket to 2^(bucket + 1) - 1 tokens: the product, and the sum of its parts if there are several.
    void add(int bucket, SharedLaunch launch, int parts, SharedLaunch sum);
    // The output; None, and nothing was launched, where the operands are others or no launch was added for them.
    py::object operator()(const Call& call) const;

private:
    enum Source { OUTPUT = -1, PARTS = -2, NULL_POINTER = -3 };
    struct Entry {
        SharedLaunch launch, sum;
        int parts = 1;
        std::vector<int> sources;  // of the launch's tensors: an operand, or a Source
    };
    struct Rows {
        int64_t tokens, stride;
    };

    bool read_rows(const Argument& tensor, int64_t features, Rows& rows) const;
    py::object new_output(const Argument& like) const;
    py::object new_parts(const Argument& like, int parts) const;

    const std::string name;
    const py::object dtype;
    const int element_bytes;
    const int device;
    const std::vector<Operand> operands;
    std::vector<py::object> words;
    const int64_t features;  // of the output's rows; 0 where the output is blocks
    const py::tuple blocks;  // shape of such an output
    const py::function current_device, current_stream;
    const py::object device_number, plain_tensor, parameter, float32, new_empty, is_contiguous, get_device;
    const py::tuple dtype_keyword;
    std::array<Entry, 63> entries;
};

}  // namespace sparsekern
