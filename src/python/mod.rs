//! The Python extension module `funicular._core`: thin, no logic. Everything that can wait releases the GIL: calls of a runtime in
//! [`engine::Engine::call`], all others in `failures::waiting` or `Python::detach`.

mod arguments;
mod buffers;
mod checkpoints;
mod completion;
mod digest;
mod dlpack;
mod engine;
mod failures;
mod figures;
mod gradients;
mod growth;
mod memory;
mod planner;
mod policies;
mod ranks;
mod records;
mod switch;

use funicular::memory::Heap;
use pyo3::prelude::*;

#[global_allocator]
static HEAP: Heap = Heap;

/// The native core of funicular.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    // If there is no address space left, the next call reports it.
    let _ = funicular::memory::set_aside();
    m.add_class::<engine::Engine>()?;
    m.add_function(wrap_pyfunction!(policies::resolve_policy, m)?)?;
    m.add_function(wrap_pyfunction!(policies::match_names, m)?)?;
    m.add_function(wrap_pyfunction!(policies::size_in_bytes, m)?)?;
    m.add_function(wrap_pyfunction!(policies::policy_schema, m)?)?;
    m.add_function(wrap_pyfunction!(completion::complete, m)?)?;
    m.add_function(wrap_pyfunction!(memory::trim, m)?)?;
    m.add_function(wrap_pyfunction!(memory::keep_for_child, m)?)?;
    m.add_function(wrap_pyfunction!(memory::forked, m)?)?;
    m.add_function(wrap_pyfunction!(digest::digest, m)?)?;
    m.add_function(wrap_pyfunction!(gradients::flush_gradients, m)?)?;
    m.add_function(wrap_pyfunction!(gradients::bring_gradients, m)?)?;
    m.add_function(wrap_pyfunction!(gradients::give_gradients, m)?)?;
    m.add_function(wrap_pyfunction!(gradients::gradients_in_memory, m)?)?;
    m.add_function(wrap_pyfunction!(gradients::lift_gradient, m)?)?;
    m.add_function(wrap_pyfunction!(gradients::expect_gradients, m)?)?;
    m.add_function(wrap_pyfunction!(gradients::brings_sums_up, m)?)?;
    m.add_function(wrap_pyfunction!(gradients::gradient_up, m)?)?;
    m.add_function(wrap_pyfunction!(gradients::wait_up, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::shared_fd, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::resolved_policy, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::plan_hash, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::owned, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::post_gradients, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::posted_gradients, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::wait_posted, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::mean_of_ranks, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::gradients_sent, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::has_failed, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::wait_gradients_landed, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::begin_wait, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::end_wait, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::at_step, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::meet_on_devices, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::trace_of_rank, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::merge_traces, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::meet, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::check_peers, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::refuse_call_elsewhere, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::enlist, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::fail_rank, m)?)?;
    m.add_function(wrap_pyfunction!(ranks::tell_ranks, m)?)?;
    m.add_class::<switch::BoundUnlessAsked>()?;
    m.add_class::<switch::ThreadSwitch>()?;
    records::register(m)?;
    m.add_function(wrap_pyfunction!(growth::may_grow, m)?)?;
    m.add_function(wrap_pyfunction!(growth::let_grow, m)?)?;
    m.add_function(wrap_pyfunction!(growth::grown, m)?)?;
    m.add_function(wrap_pyfunction!(growth::give_memory_back, m)?)?;
    m.add_function(wrap_pyfunction!(growth::make_memory_up, m)?)?;
    m.add_function(wrap_pyfunction!(growth::blocks_given_back, m)?)?;
    m.add_class::<checkpoints::Checkpoint>()?;
    m.add_class::<checkpoints::Save>()?;
    m.add_function(wrap_pyfunction!(checkpoints::save, m)?)?;
    m.add_function(wrap_pyfunction!(checkpoints::restore, m)?)?;
    m.add_function(wrap_pyfunction!(checkpoints::preserve, m)?)?;
    m.add_function(wrap_pyfunction!(checkpoints::saved, m)?)?;
    m.add_function(wrap_pyfunction!(cli, m)?)?;
    m.add_function(wrap_pyfunction!(wrapped, m)?)?;
    m.add_function(wrap_pyfunction!(coloured, m)?)?;
    m.add_function(wrap_pyfunction!(search_compiler, m)?)?;
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add("FORWARD", arguments::FORWARD)?;
    m.add("BACKWARD", arguments::BACKWARD)?;
    m.add("EVAL", arguments::EVAL)?;
    m.add("ALIGN_ELEMENTS", funicular::model::ALIGN_ELEMS)?;
    m.add("REST_BYTES", funicular::plan::source::REST_BYTES)?;
    m.add("EXCHANGES_UNDER_WAY", funicular::plan::ranks::EXCHANGES_UNDER_WAY)?;
    m.add("FACTORS_PER_STEP", funicular::runtime::FACTORS_PER_STEP)?;
    Ok(())
}

/// Runs the command line on `argv`, program name included; returns the exit status.
#[pyfunction]
fn cli(py: Python<'_>, argv: Vec<std::ffi::OsString>) -> i32 {
    let python =
        py.import("sys").and_then(|sys| sys.getattr("executable")).and_then(|e| e.extract::<std::ffi::OsString>());
    let relaunch = [python.unwrap_or_else(|_| "python3".into()), "-m".into(), "funicular".into()];
    py.detach(|| funicular::cli::run(argv.into_iter().skip(1), &relaunch, Some(&planner::load)))
}

/// Text cut for a terminal so wide, as the command line cuts its own.
#[pyfunction]
fn wrapped(text: &str, width: usize) -> String {
    funicular::text::wrapped(text, width)
}

/// Whether text for a person has colours, on a terminal or not.
#[pyfunction]
fn coloured(terminal: bool) -> bool {
    funicular::cli::coloured(terminal)
}

/// Adds files or folders in which CUDA's run-time compiler may lie.
#[pyfunction]
fn search_compiler(paths: Vec<std::path::PathBuf>) {
    #[cfg(feature = "cuda")]
    funicular::device::cuda::search_compiler(paths);
    #[cfg(not(feature = "cuda"))]
    drop(paths);
}
