// Python functions of numbers on an object of their own, for what is called at every layer: after a large layer has
// emptied the caches, the way through pybind11 to a method takes 5 microseconds longer.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

namespace mkf {

template <auto function>
class BoundFunction;

// `function` returns nothing or a bool.
template <class Result, class Object, class... Numbers, Result (*function)(const Object&, Numbers...)>
class BoundFunction<function> {
public:
    // The function on the object that a capsule holds, which it keeps.
    static pybind11::object on(const pybind11::capsule& object) {
        static PyMethodDef definition{"bound_function",
                                      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                                      METH_FASTCALL, nullptr};
        PyObject* const made = PyCFunction_New(&definition, object.ptr());
        if (made == nullptr) throw pybind11::error_already_set();
        return pybind11::reinterpret_steal<pybind11::object>(made);
    }

private:
    template <class Number>
    static Number number(PyObject* given) {
        if constexpr (std::is_floating_point_v<Number>) return static_cast<Number>(PyFloat_AsDouble(given));
        else return static_cast<Number>(PyLong_AsUnsignedLongLong(given));
    }

    static PyObject* call(PyObject* object, PyObject* const* given, Py_ssize_t count) noexcept {
        if (count != static_cast<Py_ssize_t>(sizeof...(Numbers))) {
            return PyErr_Format(PyExc_TypeError, "expected %d numbers, not %zd", static_cast<int>(sizeof...(Numbers)),
                                count);
        }
        return apply(object, given, std::index_sequence_for<Numbers...>());
    }

    template <std::size_t... i>
    static PyObject* apply(PyObject* object, PyObject* const* given, std::index_sequence<i...>) noexcept {
        const void* const self = PyCapsule_GetPointer(object, nullptr);
        const std::tuple<Numbers...> numbers{number<Numbers>(given[i])...};
        if (PyErr_Occurred()) return nullptr;
        try {
            if constexpr (std::is_void_v<Result>) {
                function(*static_cast<const Object*>(self), std::get<i>(numbers)...);
                Py_RETURN_NONE;
            } else {
                return PyBool_FromLong(function(*static_cast<const Object*>(self), std::get<i>(numbers)...));
            }
        } catch (const std::bad_alloc&) {
            return PyErr_NoMemory();
        } catch (const std::exception& e) {
            PyErr_SetString(PyExc_ValueError, e.what());
            return nullptr;
        }
    }
};

// A capsule that owns an object.
template <class Object>
pybind11::capsule hold(Object object) {
    return pybind11::capsule(new Object(std::move(object)), [](void* held) { delete static_cast<Object*>(held); });
}

}  // namespace mkf
